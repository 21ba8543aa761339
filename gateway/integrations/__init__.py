"""Ready-made parts for servers of language models: an ASGI middleware and a LiteLLM callback.

They talk to a gateway as its Python client does, and run in the server's process.
"""
