"""The model: training forward, cached decoding, files. Importing this package imports no torch."""
