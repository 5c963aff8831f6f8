"""The model families that llama.cpp knows, as `general.architecture` names them."""

from tinyoai import gguf

_DECODERS = """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bitnet bloom chameleon chatglm
    codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32
    deepseek4 dots1 dots3note ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma2
    gemma3 gemma3n gemma4 glm-dsa glm4 glm4moe glm5-next gpt-oss gpt2 gptneox granite granite_swa granitehybrid
    granitemoe graniteswitch grok grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2
    jais jais2 jamba k2-horizon kimi-k3 kimi-linear laguna lfm2 lfm2moe llama llama-embed llama4 maincoder mamba
    mamba2 maple mellum mimo2 minicpm minicpm3 minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 mpt
    muse-glimmer nanbeige nemotron nemotron_h nemotron_h_moe olmo olmo2 olmoe openelm orion paddleocr
    pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe
    qwen3moe qwen3next qwen3vl qwen3vlmoe qwen4exp refact rwkv6 rwkv6qwen2 rwkv7 seed_oss smallthinker smollm3
    spark2_5 stablelm starcoder starcoder2 step35 talkie xverse
"""
DECODERS = frozenset(_DECODERS.split())
"""Families that write text, or see it in both directions if the header says so."""

_ENCODERS = """
    bert eurobert gemma-embedding gemma-embedding2 jina-bert-v2 jina-bert-v3 modern-bert neo-bert nomic-bert
    nomic-bert-moe
"""
ENCODERS = frozenset(_ENCODERS.split())
"""Families that read a whole text at once and have no KV cache: they make embeddings only."""

REFUSED = {
    "clip": "is a projector, which turns images or sound into a model's input; name the language model that it is for",
    "t5": "is a t5 model, an encoder with a decoder, which this server does not run; choose a decoder model",
    "t5encoder": "is a t5encoder model, which this server does not run; choose another embedding model",
    "dream": "is a diffusion model, which this server does not run; choose a model that writes token by token",
    "llada": "is a diffusion model, which this server does not run; choose a model that writes token by token",
    "llada-moe": "is a diffusion model, which this server does not run; choose a model that writes token by token",
    "rnd1": "is a diffusion model, which this server does not run; choose a model that writes token by token",
    "wavtokenizer-dec": "is a sound decoder and writes no text; name a language model",
    "qwen3tts": "is a speech model and writes no text; name a language model",
    "pockettts": "is a speech model and writes no text; name a language model",
    "eagle3": "is a draft head of another model and cannot run alone; name that model",
    "dflash": "is a draft head of another model and cannot run alone; name that model",
    "gemma4-assistant": "is a draft head of another model and cannot run alone; name that model",
}
"""Families that llama.cpp knows and this engine does not run: the reason, to follow the file's name."""


def reads_whole_texts(header: gguf.Header) -> bool:
    """Whether each token of a text sees all others, so that the model needs the whole text at once."""
    # llama-embed attends to the tokens of the same step only
    causal = header.value("attention.causal", header.architecture != "llama-embed")
    return header.architecture in ENCODERS or not causal
