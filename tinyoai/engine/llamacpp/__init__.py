"""The engine over llama.cpp's library, which runs today's GGUF files. It comes with the extra `llamacpp`."""
