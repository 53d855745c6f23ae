"""Tasks of lm-evaluation-harness, answered by a model of this package with any cache method.

usage: python -m experiments.harness ask --tasks hellaswag piqa --methods full chelsea:budget=512 --limit 200
       python -m experiments.harness ask --tasks mine --include FOLDER     one's own: a YAML and its files

Needs `pip install lm_eval` beside this package, and the tasks' data: from the network, or from files that a
YAML names. A prompt is compressed at its end, and answers are decoded step by step. Where a whole text is
scored, its windows are half of the model's context. Each task of each method is stored as soon as it is done:
the same command goes on from there.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvjax
from experiments import command, results
from experiments.asked import Asked
from experiments.rows import measured, start
from kvjax import spec, thresholds
from kvjax.calibrate import codebooks
from kvjax.method import CacheMethod
from kvjax.sampling import Sampling

__all__ = ["Harness", "evaluate", "main"]

_ROWS = 16  # answers to one context that are scored together


@dataclass(frozen=True)
class Harness:
    """What to evaluate.

    Args:
        tasks: names of single tasks that the harness knows, or of `include`.
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        methods: such as full or snapkv:budget=512 (see `kvjax methods`).
        calibration: a folder of `kvjax calibrate a2ats`, for methods that take one.
        thresholds: a folder of `kvjax calibrate chess`: activations below them are left out.
        compress: when: at the prompt's "end", or after each "chunk" of it.
        include: a folder of tasks beside those of the harness.
        shots: answered examples before each question; None leaves it to the task.
        limit: questions of each task; None asks all.
        seed: chooses the examples.
        out: the folder of results.
    """

    tasks: tuple[str, ...]
    model: str = "smollm2-135m"
    dtype: str | None = None
    methods: tuple[str, ...] = ("full",)
    calibration: Path | None = None
    thresholds: Path | None = None
    compress: str = "end"
    include: Path | None = None
    shots: int | None = None
    limit: int | None = None
    seed: int = 0
    out: Path = results.FOLDER


def evaluate(settings: Harness) -> int:
    """Asks each task of each method that is not stored yet, and prints the rows.

    Raises:
        RuntimeError: where the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RuntimeError("tasks are those of lm-evaluation-harness, which is not here: pip install lm_eval")
    s = settings
    for name in s.methods:  # a wrong name is told before the model is loaded
        if "calibration" not in spec.settings_of(name):
            spec.parse(name)
    model = kvjax.load(s.model, s.dtype)
    methods = {name: _method(name, model, s) for name in s.methods}
    model = model if s.thresholds is None else thresholds.load(s.thresholds, model).apply(model)
    stored = start("harness", "ask", settings)
    for task in s.tasks:
        for name, method in methods.items():
            row = {"name": name, "task": task, "lm_eval": version("lm_eval"), "spec": repr(method)}
            asked = Asked(model, method, s.compress)
            stored = measured(stored, row, lambda task=task, asked=asked: _figures(task, asked, settings))
    print(stored.path)
    return 0


def _method(name: str, model: kvjax.Model, settings: Harness) -> CacheMethod:
    if "calibration" in spec.settings_of(name) and settings.calibration is not None:
        return spec.parse(name, calibration=codebooks.load(settings.calibration, model))
    return spec.parse(name)


def _figures(task: str, asked: Asked, settings: Harness) -> dict[str, Any]:
    """Returns what the harness finds, and of how many questions."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if settings.include is None else str(settings.include))
    if task not in manager.all_subtasks:
        raise ValueError(f"a task is one of the harness's, and no group or tag of several, got {task!r}")
    found = lm_eval.simple_evaluate(
        model=_adapted(asked), tasks=[task], num_fewshot=settings.shots, limit=settings.limit,
        task_manager=manager, log_samples=False, bootstrap_iters=0, random_seed=settings.seed,
        numpy_random_seed=settings.seed, fewshot_random_seed=settings.seed,
    )  # fmt: skip
    return {"questions": found["n-samples"][task]["effective"]} | _numbers(found["results"][task])


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of a task, by metric, and by filter where it has one."""
    numbers = {}
    for key, value in found.items():
        metric, _, kept = key.partition(",")
        if isinstance(value, int | float) and "stderr" not in metric and kept:
            numbers[metric if kept == "none" else f"{metric} {kept}"] = float(value)
    return numbers


def _adapted(asked: Asked) -> Any:
    """Returns the model as the harness wants it."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    tokenizer, context = asked.model.tokenizer, asked.model.config.context_length

    class Adapted(TemplateLM):
        """Answers requests one context after the other; its choices share the prompt."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.stop_ids[0] if tokenizer.stop_ids else 0

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if tokenizer.bos_id is None else tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string, bos=False if add_special_tokens is False else None)

        def _loglikelihood_tokens(self, requests: Sequence, **_: Any) -> list[tuple[float, bool]]:
            by_context: dict[tuple, list[int]] = {}
            for i, (_, prompt, _) in enumerate(requests):
                by_context.setdefault(tuple(prompt), []).append(i)
            found = [(0.0, False)] * len(requests)
            parts = (
                (p, all_[i : i + _ROWS]) for p, all_ in by_context.items() for i in range(0, len(all_), _ROWS)
            )
            for prompt, at in parts:
                answers = asked.likelihoods(prompt, [requests[i][2] for i in at])
                for i, answer in zip(at, answers, strict=True):
                    found[i] = answer
            return found

        def loglikelihood_rolling(self, requests: Sequence, **_: Any) -> list[float]:
            found = []
            for (string,) in (request.args for request in requests):
                tokens = self.tok_encode(string, add_special_tokens=False)
                windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, context // 2, 1)
                pairs = map(utils.make_disjoint_window, windows)
                found.append(sum(asked.likelihoods(prompt, [rest])[0][0] for prompt, rest in pairs))
            return found

        def generate_until(self, requests: Sequence, **_: Any) -> list[str]:
            found = []
            for prompt, how in (request.args for request in requests):
                until = how.get("until") or []
                heat = float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0
                answer = asked.continued(
                    tokenizer.encode(prompt), [until] if isinstance(until, str) else until,
                    int(how.get("max_gen_toks", 256)), Sampling(heat, top_p=float(how.get("top_p", 1.0))),
                )  # fmt: skip
                found.append(answer)
            return found

    return Adapted()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, see `command.run`."""
    return command.run({"ask": (Harness, evaluate)}, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
