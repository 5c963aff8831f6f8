"""The built-in model, tinyoai-chat.gguf. `training/` is the recipe that made it."""
