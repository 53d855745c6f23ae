"""Times one library's prefill and greedy decode, over and over, on request.

usage: python experiments/peer_child.py torch|kvjax        (started by experiments/peers.py)

The first line on stdin is a JSON request: model (a GGUF file), ids, n_new, n_threads, logits (the
.npy file to write the prompt's last logits to). The reply tells versions, seconds to load and
seconds of the warm-up. Each further line asks for one more run, whose reply tells prefill_s and
decode_s, both summed over cores too (prefill_core_s, decode_core_s), and the greedy ids. The
other library's child waits on stdin meanwhile and uses no CPU.

The torch side runs in the `peer` extra; this file imports nothing of ours but for kvjax's side.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

Generate = Callable[[], dict]  # one timed run


def use_threads(n_threads: int) -> None:
    """Binds this process, before any library starts, to n_threads cores where the system can."""
    os.environ["OMP_NUM_THREADS"] = str(n_threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n_threads])


def open_torch(request: dict) -> Generate:
    """Loads transformers on torch: float32, sdpa, its own growing cache."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(request["n_threads"])
    folder, file = os.path.split(os.path.abspath(request["model"]))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    prompt = torch.tensor([request["ids"]])

    @torch.inference_mode()
    def run() -> dict:
        start = now()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        logits = out.logits[0, -1].numpy()
        middle = now()
        token, made = out.logits[:, -1].argmax(-1, keepdim=True), []
        for _ in range(request["n_new"]):
            made.append(token)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        ids = [*torch.cat(made, 1)[0].tolist(), token.item()]
        return reply(start, middle, ids, logits, request)

    return run


def open_kvjax(request: dict) -> Generate:
    """Loads kvjax: float32, the full cache, prompt in chunks, all new tokens in one compiled loop."""
    import kvjax
    from kvjax.methods.full import Full

    model = kvjax.load(request["model"], dtype="float32")
    prompt = np.asarray([request["ids"]], np.int32)
    draw = np.full((1, request["n_new"]), -1, np.int32)

    def run() -> dict:
        start = now()
        logits, state = kvjax.prefill(model, prompt, room=request["n_new"])
        first = np.asarray(logits[0])
        middle = now()
        tokens, logits, _, _ = kvjax.decode(model, logits, state, Full(), draw)
        ids = [*np.asarray(tokens)[0].tolist(), int(np.argmax(np.asarray(logits)[0]))]
        return reply(start, middle, ids, first, request)

    return run


def now() -> np.ndarray:
    """Returns seconds: of the clock, and of all cores in this process."""
    return np.asarray([time.perf_counter(), time.process_time()])


def reply(start: np.ndarray, middle: np.ndarray, ids: list[int], logits: np.ndarray, request: dict) -> dict:
    """Returns the figures of a run that ends now, and writes its logits."""
    (prefill_s, prefill_core_s), (decode_s, decode_core_s) = middle - start, now() - middle
    np.save(request["logits"], logits.astype(np.float32))
    return {
        "prefill_s": prefill_s,
        "prefill_core_s": prefill_core_s,
        "decode_s": decode_s,
        "decode_core_s": decode_core_s,
        "ids": ids,
    }


SIDES = {
    "torch": (open_torch, ("torch", "transformers")),
    "kvjax": (open_kvjax, ("jax", "jaxlib", "flax")),
}


def serve(side: str) -> None:
    """Answers requests until stdin ends."""
    open_side, packages = SIDES[side]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints does not get between the replies
    line = sys.stdin.readline()
    if not line:
        return  # whoever started us has gone
    request = json.loads(line)
    use_threads(request["n_threads"])
    start = time.perf_counter()
    run = open_side(request)
    loaded = time.perf_counter()
    run()
    ready = {
        "load_s": loaded - start,
        "warm_up_s": time.perf_counter() - loaded,
        "versions": {name: version(name) for name in packages},
    }
    print(json.dumps(ready), file=out)
    for _ in sys.stdin:
        print(json.dumps(run()), file=out)


if __name__ == "__main__":
    serve(sys.argv[1])
