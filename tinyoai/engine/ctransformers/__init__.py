"""The engine over ctransformers 0.2.27, whose library runs llama and falcon files of 2023 and legacy GGML files."""
