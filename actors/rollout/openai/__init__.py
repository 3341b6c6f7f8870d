"""Rollout by a server of others that speaks OpenAI's completions with token ids: vLLM, SGLang, llama.cpp."""
