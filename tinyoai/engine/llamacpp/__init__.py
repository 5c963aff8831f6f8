"""The engine for GGUF files of today: libllama through its C API."""
