"""`python -m cocktail.calibrate kvquant MODEL --out FILE.safetensors`: the levels that KVQuant's formats read by.

One prefill over calibration text. Of every layer, as it is computed:

    k_centre, k_half (G, D)    the middle and half the width of what lies between the 0.5 and 99.5 percentiles of each
                               channel of K before RoPE
    k_levels.B, v_levels.B     (2^B,) ascending, B = 2, 3, 4: k-means of the normalised values without outliers; V is
                               normalised token by token, as it will be when it is packed

all float32, named "layers.N.k_centre" and so on. The published method weights the values by the squared gradient of the
loss; there are no gradients here, so every value counts the same, and the file says so ("weighting": "none").

Results go to stdout, progress to stderr. Exit codes: 0; 2 after an error, which is one line; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cocktail.cli.arguments import Parser
from cocktail.cli.entry import run_command
from runtime.calibration import VERSION
from runtime.errors import OutOfMemory, PlanError, PromptError, TuneError
from runtime.formats import kvquant, turn_back
from runtime.rope import attention_factor

if TYPE_CHECKING:
    from cocktail.model import Model
    from runtime.backend import Array, Backend

F32 = npt.NDArray[np.float32]

PERCENTILES = (0.5, 99.5)
TOKENS, LEAST_TOKENS = 8192, 256
BINS = 4096  # of the normalised values that k-means sees, each with its mean and its weight


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; bad arguments exit with 2 at once."""
    return run_command(parser(), _run, arguments, interrupted="interrupted; nothing was written")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m cocktail.calibrate",
               description="Measure what a storage format has to know of a model before it can pack.")
    p.add_argument("format", choices=("kvquant",), help="the only family that needs it")
    p.add_argument("model", metavar="MODEL", help=".safetensors file, .index.json of a sharded one, or folder")
    p.add_argument("--out", metavar="FILE", required=True, help="the .safetensors file to write")
    p.add_argument("--text", metavar="FILE", help="UTF-8 text to calibrate on (default: Python's own reference topics)")
    p.add_argument("--tokens", metavar="N", type=int,
                   help=f"of it, as one prompt (default: {TOKENS}, or what the model takes)")
    p.add_argument("--backend", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    p.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: measured)")
    p.add_conventions(quiet="no progress")
    return p


def calibrate(model: Model, ids: Sequence[int], progress: Callable[[int, int], None] | None = None) -> dict[str, F32]:
    """The tensors of the file, from one prefill of ids; progress(steps done, in all). Raises PlanError, OutOfMemory."""
    from runtime.model import prefill

    if attention_factor(model.config.rope) != 1:
        raise PlanError(f"this model's RoPE scales what it turns ({model.config.rope.kind}), so K cannot be turned "
                        "back to before it; kvquant and atom need that, other formats do not")
    engine, backend = model.engine, model.backend
    cos, sin = rope = engine.rope(len(ids), len(ids))
    observer: Any = _Observer(backend, backend.download(cos), backend.download(sin))
    try:
        logits = backend.empty((1, model.config.vocab_size), np.float32)
        for done, total in prefill(engine, ids, rope, (observer,), logits, backend.prefill_tile):
            if progress is not None:
                progress(done, total)
    except MemoryError as error:
        raise OutOfMemory(f"no memory to calibrate on {len(ids)} tokens: {error}; --tokens of fewer need less"
                          ) from error
    tensors: dict[str, F32] = observer.tensors
    return tensors


def channel_range(k: F32) -> tuple[F32, F32]:
    """Centre and half range (G, D) of each channel of k (G, T, D) between PERCENTILES."""
    low, high = np.percentile(k, PERCENTILES, axis=1).astype(np.float32)
    return (high + low) * np.float32(0.5), (high - low) * np.float32(0.5)


def token_range(v: npt.NDArray[np.float16]) -> tuple[F32, F32]:
    """Centre and half range (T,) of each token of v (G, T, D) over all heads without its 1 % of outliers."""
    tokens = v.swapaxes(0, 1).reshape(v.shape[1], -1).astype(np.float32)
    n = tokens.shape[1]
    k = kvquant.beyond(n)
    low, high = np.partition(tokens, (k, n - 1 - k), axis=1)[:, [k, n - 1 - k]].T
    return (((high + low) * np.float32(0.5)).astype(np.float16).astype(np.float32),
            ((high - low) * np.float32(0.5)).astype(np.float16).astype(np.float32))


def levels(values: F32, bits: int) -> F32:
    """(2^bits,) ascending: k-means of those of the normalised values that lie within -1 .. 1.

    Raises PlanError where these are fewer than the levels.
    """
    from sklearn.cluster import KMeans

    inside = values[np.abs(values) <= 1].astype(np.float64)
    place = np.minimum(((inside + 1) * (BINS / 2)).astype(np.int64), BINS - 1)
    weights = np.bincount(place, minlength=BINS)
    used = weights > 0
    if np.count_nonzero(used) < 2**bits:
        raise PlanError(f"{np.count_nonzero(used)} different values for {2**bits} levels")
    points, weights = (np.bincount(place, inside, BINS)[used] / weights[used])[:, None], weights[used]
    found = KMeans(2**bits, n_init=4, random_state=0).fit(points, sample_weight=weights).cluster_centers_
    return np.sort(found[:, 0]).astype(np.float32)


class _Observer:
    """Stands where a Cache would in prefill: measures a layer's K and V and keeps what it found, not them."""

    def __init__(self, backend: Backend, cos: F32, sin: F32) -> None:
        self.tensors: dict[str, F32] = {}
        self._backend, self._cos, self._sin = backend, cos, sin

    def pack(self, layer: int, k: Array, v: Array) -> None:
        before = turn_back(self._backend.download(k), self._cos, self._sin)
        values = np.asarray(self._backend.download(v))
        k_centre, k_half = channel_range(before)
        centre, half = token_range(values)
        normal = {"k": kvquant.normal(before, k_centre[:, None], k_half[:, None]),
                  "v": kvquant.normal(values.astype(np.float32), centre[:, None], half[:, None])}
        found = {"k_centre": k_centre, "k_half": k_half}
        for kind, each in normal.items():
            for bits in kvquant.WIDTHS:
                try:
                    found[f"{kind}_levels.{bits}"] = levels(each, bits)
                except PlanError as error:
                    raise PlanError(f"{kind.upper()} of layer {layer}: {error}; the weights or the text are degenerate"
                                    ) from None
        self.tensors |= {f"layers.{layer}.{name}": np.ascontiguousarray(tensor) for name, tensor in found.items()}


def _run(options: argparse.Namespace) -> None:
    _check(options)
    import cocktail
    from cocktail.policies.pairs import fingerprint
    from cocktail.summary import StageProgress
    from cocktail.tuning.calibration import read_text

    text = _topics() if options.text is None else read_text(options.text)
    model = cocktail.load(options.model, backend=options.backend, threads=options.threads)
    ids = _ids(model, text, options.tokens)
    progress = StageProgress(shown=not options.quiet)
    try:
        tensors = calibrate(model, ids, progress.of("calibrate"))
    finally:
        progress.close()
    _save(Path(options.out), tensors, {"version": VERSION, "fingerprint": fingerprint(model.engine),
                                       "weighting": "none", "tokens": str(len(ids))})
    print(f"{model.config.n_layers} layers, {len(ids):,} tokens, unweighted k-means; written to {options.out}")


def _check(options: argparse.Namespace) -> None:
    """What can be refused before the model is loaded."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise TuneError("scikit-learn cannot be imported; run: pip install 'cocktail-kv[tune]'") from None
    if options.tokens is not None and options.tokens < LEAST_TOKENS:
        raise TuneError(f"--tokens is {options.tokens}; expected at least {LEAST_TOKENS}")
    if not Path(options.out).resolve().parent.is_dir():
        raise TuneError(f"{options.out}: its folder does not exist")


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def _ids(model: Model, text: str, tokens: int | None) -> list[int]:
    tokenizer, positions = model.tokenizer, model.config.max_positions
    wanted = tokens or min(TOKENS, positions)
    if wanted > positions:
        raise PromptError(f"--tokens is {wanted}; the model has {positions} positions")
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    ids = [*begin, *tokenizer.encode(text)][:wanted]
    if len(ids) < (tokens or LEAST_TOKENS):
        raise PromptError(f"the text has {len(ids)} tokens; expected at least {tokens or LEAST_TOKENS}")
    return ids


def _save(path: Path, tensors: dict[str, F32], metadata: dict[str, str]) -> None:
    """All or nothing: a file that is there is whole."""
    from safetensors.numpy import save_file

    unfinished = path.with_name(path.name + ".part")
    try:
        save_file(tensors, unfinished, metadata)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise TuneError(f"{path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
