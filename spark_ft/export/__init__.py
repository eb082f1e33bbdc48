"""Out of the notebook: merged weights as safetensors or GGUF, a check, a real server, and Ollama."""
