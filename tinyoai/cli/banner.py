"""The banner of a server that is ready: its address, its model and a first request. Logs warnings after it."""

import logging

from tinyoai import __version__
from tinyoai.app import Serving
from tinyoai.web.listen import is_loopback

logger = logging.getLogger("tinyoai.app")


def show(serving: Serving) -> None:
    """Prints the banner and warns about settings that may be unintended."""
    print("\n".join(_lines(serving)), flush=True)
    _warn(serving)


def _lines(serving: Serving) -> list[str]:
    config, ready = serving.config, serving.ready
    info, url, folder = ready.info, serving.base_url, config.models_dir
    size = f", {info.file_size / 1e6:.1f} MB" if info.file_size else ""
    parameters = f", {_short(info.n_params)} parameters" if info.n_params else ""
    body = (
        f'{{"model": "{info.name}", "stream": true, "temperature": 0, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    )
    key = " -H 'Authorization: Bearer YOUR_KEY'" if serving.requires_key else ""
    each = " for each request" if ready.n_slots > 1 else ""
    shared = (
        f", which share {ready.n_cells} tokens"
        if info.n_ctx < ready.n_cells < info.n_ctx * ready.n_slots
        else ""
    )
    slots = f"{ready.n_slots} request{'s' if ready.n_slots > 1 else ''} at a time{shared}"
    version = f" {info.engine_version}" if info.engine_version else ""
    lines = [
        f"tinyoai {__version__} is ready",
        f"  base URL  {url}",
        f"  model     {info.name} ({info.architecture}, {info.quantization}{parameters}{size})",
        *([f"  more      the models in {folder}, loaded when asked for: {url}/models"] if folder else []),
        f"  context   {info.n_ctx} tokens{each}, {slots}",
        f"  engine    {info.engine}{version}, {ready.n_threads} thread{'s' if ready.n_threads > 1 else ''}",
        f"  docs      {url.removesuffix('/v1')}/docs",
        "try it:",
        f"  curl -N {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
    ]
    if info.engine != "fake" and not config.model and not folder:
        lines.append("this model is a tiny demonstration; --model FILE serves one of yours")
    return lines


def _warn(serving: Serving) -> None:
    config, info = serving.config, serving.ready.info
    if 0 < info.n_ctx_train < info.n_ctx:
        logger.warning(
            "a context of %d tokens is longer than the %d that %s was trained with; "
            "answers beyond those may make no sense",
            info.n_ctx,
            info.n_ctx_train,
            info.name,
        )
    if not is_loopback(config.host) and not serving.requires_key:
        logger.warning(
            "ANYONE who can reach %s can use this server, since it requires no API key; "
            "set TINYOAI_API_KEY or --api-key-file unless this is intended",
            config.host or "this machine",
        )
    if config.api_key_file:
        _warn_of_exposed_keys(config.api_key_file)


def _warn_of_exposed_keys(file: str) -> None:
    from tinyoai.web import api_keys  # late: most servers have no key file

    if api_keys.exposed(file):
        logger.warning("every user of this machine can read %s: chmod 600 it", file)


def _short(count: int) -> str:
    """12345678 as 12.3 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
