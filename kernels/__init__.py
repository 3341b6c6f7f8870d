"""Operations for mixture-of-experts token balancing, and their plain reference. Knows nothing of actors or models."""

if __name__ == "kernels":
    raise ImportError(
        "this folder was imported as top-level `kernels`, which shadows the Hugging Face package of that name; "
        "import `headrace.kernels`, and start Python with -P or PYTHONSAFEPATH=1 inside the repository"
    )
