"""The child process of `serve`: llama.cpp's server, while the parent holds the other end of a pipe."""

import json
import os
import sys


def main() -> None:
    """Read the settings from the first line of stdin, print the address, and stay until stdin closes."""
    import xllamacpp

    settings, params = json.loads(sys.stdin.readline()), xllamacpp.CommonParams()
    params.model.path, params.model_alias = settings["model"], {"spark_ft"}
    params.port, params.hostnames = 0, ["127.0.0.1"]  # a free port, and nobody else's machine
    params.cors_origins = "http://127.0.0.1"  # by itself it lets any page in the browser ask and read
    params.n_ctx, params.n_parallel, params.cache_ram_mib, params.ui = settings["context"], 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    # llama.cpp adds up all adapters at their scale, so each starts at 0 and a request asks for one
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in settings["adapters"]]
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()  # until the parent closes the pipe or is no more
    os._exit(0)  # at once, in the middle of an answer too


if __name__ == "__main__":
    main()
