"""A server of one model, as a function: `keras-vaultgemma serve`."""

import ipaddress
import socket
import sys
from pathlib import Path

from keras_vaultgemma.recipes.sources import find_source, load_model
from keras_vaultgemma.serving.models import Models
from keras_vaultgemma.serving.options import ServeOptions
from keras_vaultgemma.serving.scheduler import Scheduler
from keras_vaultgemma.serving.warm_up import warm_up

PRE_TRAINED = "pre-trained only: it continues text, and has not been trained to follow instructions"
"""What the model is unless an adapter says otherwise."""


def serve(preset=None, adapters=(), dtype=None, quantization=None, skip_warm_up=False, **options):
    """Answer requests of OpenAI's interface until the process is interrupted.

    `POST /v1/completions` and `/v1/chat/completions`, `GET /v1/models`, `/health`, and `/`, a page
    to try it. Requests that arrive together are decoded together.

    Args:
        preset: string or path, as for `sources.find_source`. Defaults to the base of the first
            adapter, and to "vaultgemma_tiny" without one.
        adapters: list of strings, `NAME=FOLDER` or `FOLDER`, whose last part is then the name. Each
            adapter is a model of its own to clients.
        dtype: string. Dtype of the weights. Defaults to that of the preset.
        quantization: string, "int8" or "int4". Quantize the weights. Defaults to None.
        skip_warm_up: bool. If True, functions are compiled when they are first needed. Defaults to
            `False`.
        **options: Of `ServeOptions`:
            `host`, address to listen on, by default "127.0.0.1", which this machine alone reaches;
            `port`, by default 8000, 0 for any free one;
            `api_key`, that clients must send, by default None;
            `allow_hosts`, names besides addresses and "localhost" by which clients may call it;
            `allow_origins`, of web pages that may call it;
            `max_rows`, that are decoded together, by default 8;
            `max_queue`, answers that wait, by default 256;
            `max_body`, bytes of a request, by default 1 MiB;
            `max_connections`, by default 512;
            `timeout`, seconds in which an answer must be complete, by default 600.

    Returns:
        String that says that the server has ended.

    Raises:
        ValueError: If an option is out of its range, or the model takes no text.
        ImportError: If Starlette or uvicorn is not installed.
        OSError: If the port is taken.
    """
    uvicorn = _uvicorn()
    options = ServeOptions(**options)
    models = load_models(preset, adapters, dtype, quantization)
    scheduler = Scheduler(models, options.max_rows, options.max_queue)
    if not skip_warm_up:
        warm_up(scheduler.batch)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server(
        (options.host, options.port), family=family, backlog=2048
    ) as listener:
        _report(models, options, listener.getsockname()[1])
        uvicorn.Server(config(models, scheduler, options)).run(sockets=[listener])
    return "The server has ended"


def load_models(preset=None, adapters=(), dtype=None, quantization=None):
    """Return the `Models` of a preset and adapters. See `serve`."""
    folders = {}
    for adapter in adapters:
        name, _, folder = adapter.rpartition("=")
        name = name or Path(folder).name
        if not name or name in folders:
            raise ValueError(f"`adapters` must have different names. Received: {adapter}")
        folders[name] = folder
    sources = {name: find_source(preset, folder) for name, folder in folders.items()}
    source = next(iter(sources.values()), None) or find_source(preset)
    found = {name: source.adapter for name, source in sources.items()}
    if not sources and source.adapter is not None:  # the preset is an adapter itself
        found[Path(preset).name] = source.adapter
    model = load_model(source._replace(adapter=None), dtype, quantization)
    if model.preprocessor is None:
        raise ValueError(
            f"The model must have a vocabulary to take text. Received: {source.preset}"
        )
    return Models(model, Path(source.preset).name.partition("@")[0], found)


def config(models, scheduler, options):
    """Return uvicorn's config of a server of `Models`."""
    from keras_vaultgemma.serving.app import App

    return _uvicorn().Config(
        App(models, scheduler, options).asgi,
        limit_concurrency=options.max_connections,
        timeout_graceful_shutdown=5,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
    )


def _report(models, options, port):
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"Listening on http://{host}:{port}: {', '.join(models.names)}", file=sys.stderr)
    print(f"{models.base} is {PRE_TRAINED}", file=sys.stderr)
    if options.api_key is None and not _is_loopback(options.host):
        print("Anyone who can reach this address can use it: set an API key", file=sys.stderr)


def _is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _uvicorn():
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError(
            'A server needs Starlette and uvicorn: pip install "keras-vaultgemma[serve]"'
        ) from error
    return uvicorn
