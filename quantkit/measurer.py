"""Measures what each linear of a model loses in each mix of bits, layer by layer, and resumes when interrupted.

The loss of a linear is ½ · Σ over its outputs of the mean square of the gradient there (calibration.sensitivity) times
the energy of the error that the mix makes of that output (e·H·eᵀ a token): what the model's distribution moves by, if
errors of one linear do not make up for each other's. H weighs tokens by their own gradients. Weights are solved as in a
run, but without refinement, and of tall ones some rows stand for all. At the end, what is expected of each kind of
linear is set right by what is measured of it (calibration.trials).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.architectures import Linear
from quantkit.calibration.data import Tokens
from quantkit.checkpoint.journal import FOLDER, Journal
from quantkit.checkpoint.reader import SourceFiles, not_finite
from quantkit.checkpoint.system import cores
from quantkit.checkpoint.writer import write_file
from quantkit.console import Console, Progress
from quantkit.errors import Interrupted, NotFiniteError, OutputError, RunError
from quantkit.layer_memory import SHORT, SHORT_ROWS, TRIAL_ROWS
from quantkit.layouts import Checkpoint
from quantkit.measurement import FORMAT, ROWS, LinearLosses, Measurement, digest_of_weights
from quantkit.methods.base import Array, Mixed, Mixing, WeightSpec
from quantkit.recipe import Recipe
from quantkit.version import __version__

if TYPE_CHECKING:
    import torch

    from quantkit.calibration.energies import Energies
    from quantkit.calibration.sensitivity import Squares
    from quantkit.calibration.statistics import Statistics
    from quantkit.calibration.stream import Stream
    from quantkit.calibration.trials import Trials
    from quantkit.solvers.team import Team

SAMPLE = 384  # outputs of a linear that stand for all of them
HELD_OUT = 3  # one row in so many is not among those that weights are solved on
TRIAL_BITS = 3.25  # about the bits that they are compared at: errors are large enough to tell, and not all there is


@dataclass(frozen=True)
class Job:
    """What is measured: the linears, in order, the ways to write them, the text. source: the model's public name."""

    checkpoint: Checkpoint
    source: str
    linears: Sequence[Linear]
    specs: Sequence[WeightSpec]
    mixing: Mixing[Any]
    params: Mixed
    tokens: Tokens
    threads: int
    device: str
    allow_nonfinite: bool

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        checkpoint: Checkpoint,
        source: str,
        linears: Sequence[Linear],
        specs: Sequence[WeightSpec],
        params: Mixed,
        tokens: Tokens,
    ) -> Job:
        assert recipe.mixing is not None
        threads, device = recipe.resources.threads or cores(), recipe.resources.device
        text, nonfinite = tokens.first(ROWS), recipe.allow_nonfinite
        return cls(checkpoint, source, linears, specs, recipe.mixing, params, text, threads, device, nonfinite)

    @property
    def label(self) -> str:
        return self.mixing.label(self.params)

    def losses(self, spec: WeightSpec, found: Mapping[str, dict[str, float]]) -> dict[str, float]:
        """Of linears outside of the layers nothing is known of their inputs: they get the best there is."""
        return found.get(spec.module) or {self.mixing.options(self.params, spec)[-1]: 0.0}


def workplace(path: Path) -> Path:
    """The folder of an unfinished measurement."""
    return path.with_name(path.name + ".work")


def measure(job: Job, path: Path, console: Console, team: Team | None = None) -> Measurement:
    """Measures, and writes `path`, with a team, if there is one, whose leader writes. Raises Interrupted on Ctrl-C: the
    same call takes up where it stopped."""
    if team is not None and not team.leads:
        with SourceFiles(job.checkpoint.folder, job.checkpoint.files) as files:
            _Run(job, workplace(path) / FOLDER / "hidden", files, None, console, team).run()
        told: Measurement = team.hear()
        return told
    found = _measure(job, path, console, team)
    return found if team is None else team.tell(found)


def _measure(job: Job, path: Path, console: Console, team: Team | None) -> Measurement:
    work = workplace(path)
    try:
        work.mkdir(parents=True, exist_ok=True)
        journal = Journal(work)
    except OSError as e:
        raise OutputError(
            f"the measurement cannot be written: {e.strerror}", where=str(path.parent), hint="name another file"
        ) from None
    try:
        if journal.damage:
            console.warn(journal.damage)
        with SourceFiles(job.checkpoint.folder, job.checkpoint.files) as files:
            weights = digest_of_weights(job.checkpoint, files, [s.module for s in job.specs])
            head = {
                "quantkit": __version__, "weights": weights, "tokens": job.tokens.sha256, "method": job.label,
                "compute": _dtype(job.device), "device": job.device.partition(":")[0],
            }  # fmt: skip
            if journal.head != head:
                journal.start(head)
            losses, kinds = _Run(job, work / FOLDER / "hidden", files, journal, console, team).run()
        count, length = job.tokens.ids.shape
        found = Measurement(
            format=FORMAT, quantkit=__version__, method=job.label, source=job.source, weights=weights,
            text=job.tokens.name, tokens=job.tokens.sha256, rows=count, length=length, kinds=kinds,
            linears={
                s.module: LinearLosses(rows=s.rows, columns=s.columns, losses=job.losses(s, losses))
                for s in job.specs
            },
        )  # fmt: skip
        write_file(path, found.to_bytes())
        journal.remove()
        shutil.rmtree(work, ignore_errors=True)
        return found
    except NotFiniteError:
        journal.remove()
        shutil.rmtree(work, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; what is measured is kept", where=str(work), hint="the same command takes up where it stopped"
        ) from None
    finally:
        journal.close()


def _dtype(device: str) -> str:
    """What linears multiply in there."""
    import torch

    from quantkit.torch_setup import fast_dtype

    return str(fast_dtype(torch.device(device)))


class _Run:
    """journal: the leader's; others of a team have none. Gradients and trials, of few rows, are the leader's alone."""

    def __init__(
        self,
        job: Job,
        scratch: Path,
        files: SourceFiles,
        journal: Journal | None,
        console: Console,
        team: Team | None,
    ) -> None:
        from quantkit.solvers.team import ALONE

        self.job, self.scratch, self.files, self.journal, self.console = job, scratch, files, journal, console
        self.team = team or ALONE
        self.specs = {spec.module: spec for spec in job.specs}

    def run(self) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Losses by module and mix; by kind of linear, how many times what was expected was measured."""
        import torch

        from quantkit.calibration.energies import Energies, to_bytes
        from quantkit.calibration.layers import Linear as Streamed
        from quantkit.calibration.sensitivity import Sensitivity
        from quantkit.calibration.skeleton import Skeleton
        from quantkit.calibration.stream import Stream
        from quantkit.calibration.trials import Trials, kind_of
        from quantkit.calibration.weights import CheckpointWeights
        from quantkit.torch_setup import fast_dtype, torch_settings

        job = self.job
        weights = CheckpointWeights(job.checkpoint, self.files, self._look)
        skeleton = Skeleton(job.checkpoint.config, job.checkpoint.tensors, job.checkpoint.folder, job.device)
        places = {p.name: p for layer in skeleton.inside for p in layer}
        layers: list[dict[str, Streamed]] = [{} for _ in skeleton.layers]
        for linear in (x for x in job.linears if x.layer >= 0):
            layers[linear.layer][linear.module] = Streamed(
                places[f"{linear.module}.weight"], linear.transposed, linear.expert
            )
        entries = [] if self.journal is None else self.journal.entries
        if self.team.leads:
            self.scratch.mkdir(exist_ok=True)
        compute = fast_dtype(skeleton.device)
        ids = torch.from_numpy(job.tokens.ids.copy())
        found: dict[str, dict[str, float]] = {}
        done = [e for e in entries if "layer" in e]
        kept = self.scratch / "gradients.safetensors"
        digest = next((str(e["gradients"]) for e in reversed(entries) if "gradients" in e), "")
        known = bool(digest) and kept.is_file() and sha256(kept.read_bytes()).hexdigest() == digest
        size = sum(spec.numel for spec in job.specs)
        # Weights are solved on some rows, and what that costs is looked at on others.
        first = len(ids) - len(ids) // HELD_OUT
        held_out = ids[first:] if first < len(ids) else ids
        with torch_settings(job.threads), self.console.progress(3 * size) as progress:
            if not known and self.journal is not None:
                short = held_out[:SHORT_ROWS, :SHORT]
                squares = Sensitivity(skeleton, weights, short, layers, self.scratch, compute).run(
                    lambda index: self._passed(progress, layers[index], f"gradients, layer {index}")
                )
                write_file(kept, raw := to_bytes(squares))
                if done and digest != sha256(raw).hexdigest():  # layers were measured by others
                    done = []
                    self.journal.start(self.journal.head or {})
                digest = sha256(raw).hexdigest()
                self.journal.append([{"gradients": digest}])
            else:
                progress.advance(2 * size)
            gradients = self._gradients(kept, self.team.tell(digest))
            kinds = {x.module: kind_of(x.module, x.layer) for x in job.linears if x.layer >= 0}
            few = held_out[:TRIAL_ROWS, :SHORT]
            with (
                closing(
                    Stream(skeleton, weights, ids, layers, self.scratch, full=False, compute=compute, team=self.team)
                ) as stream,
                ExitStack() as stack,
            ):
                trials = None
                if self.journal is not None:
                    trials = Trials(skeleton, weights, few, layers, kinds, self.scratch, compute)
                    stack.enter_context(closing(trials))
                    if done and not _kept(stream, trials, done[-1]):
                        self.console.warn(
                            "hidden states of the unfinished run are gone or altered: all layers are measured again"
                        )
                        done = []  # and nothing of them may be taken for a layer of this run
                        self.journal.start(self.journal.head or {})
                        self.journal.append([{"gradients": digest}])
                done = self.team.tell(done)
                for entry in done:
                    found |= entry["losses"]
                    stream.excluded = set(entry["excluded"])
                    self._passed(progress, layers[entry["layer"]], "")
                energies = Energies(gradients, len(ids) - len(held_out))
                stream.apart = frozenset(range(first, len(ids)))
                stream.watch = energies.add
                stream.begin(len(done))
                stream.check(len(done), done[-1]["hidden"] if done else {})
                if trials is not None:
                    trials.begin(len(done))
                for index in range(len(done), len(layers)):
                    losses: dict[str, dict[str, float]] = {}

                    def look(
                        _: tuple[str, ...],
                        seen: Statistics,
                        losses: dict[str, Any] = losses,
                        trials: Trials | None = trials,
                    ) -> Mapping[str, torch.Tensor]:
                        lost, restored = _losses(seen, job, self.specs, energies, self.team)
                        losses |= lost
                        if trials is not None:
                            for name in list(restored):
                                trials.keep(name, restored.pop(name))
                        return dict(seen.weights)

                    stream.layer(index, look)
                    hidden = stream.sums(index + 1)
                    if trials is not None and self.journal is not None:
                        trials.layer(index)
                        entry = {
                            "layer": index, "losses": losses, "excluded": sorted(stream.excluded),
                            "hidden": hidden, "trials": trials.sums(index + 1),
                        }  # fmt: skip
                        self.journal.append([entry])
                    found |= losses
                    self._passed(progress, layers[index], f"losses, layer {index}")
                measured = self.team.tell({} if trials is None else trials.divergences())
        return self._corrected(found, kinds, measured)

    def _gradients(self, path: Path, digest: str) -> Mapping[str, Squares]:
        """What the leader wrote. RunError if this machine sees something else."""
        from quantkit.calibration.energies import read_squares

        if sha256(raw := path.read_bytes()).hexdigest() != digest:
            raise RunError(
                f"{path.name} is not what was written", where=str(path.parent),
                hint="wait until all machines see the same files, and run the same command again",
            )  # fmt: skip
        return read_squares(raw)

    def _corrected(
        self, found: Mapping[str, Mapping[str, float]], kinds: Mapping[str, str], measured: Mapping[str, float]
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Losses of each kind by the factor that makes its trial come out as it was measured."""
        expected = dict.fromkeys(measured, 0.0)
        for name, own in found.items():
            expected[kinds[name]] += own[_trial_mix(self.job, self.specs[name])]
        factors = dict.fromkeys(measured, 1.0)
        for kind, divergence in measured.items():
            if expected[kind] > 0 and 0 < divergence < float("inf"):
                factors[kind] = float(f"{divergence / expected[kind]:.4g}")
        corrected = {
            name: {mix: float(f"{loss * factors[kinds[name]]:.6g}") for mix, loss in own.items()}
            for name, own in found.items()
        }
        return corrected, factors

    def _look(self, name: str, flat: Array) -> None:
        """NotFiniteError for a linear that holds what is not finite, unless that is allowed, and then zero."""
        from quantkit.kernels.floats import first_nonfinite, zero_nonfinite

        tensor = self.job.checkpoint.tensors[name]
        at = first_nonfinite(flat, tensor.dtype) if name.removesuffix(".weight") in self.specs else -1
        if at >= 0 and not self.job.allow_nonfinite:
            raise not_finite(tensor, at, self.job.checkpoint.folder)
        if at >= 0:
            zero_nonfinite(flat, tensor.dtype)

    def _passed(self, progress: Progress, layer: Mapping[str, Any], what: str) -> None:
        size = sum(self.specs[name].numel for name in layer)
        progress.advance(size)
        if what:
            progress.unit(what, 2 * size)


def _kept(stream: Stream, trials: Trials, entry: Mapping[str, Any]) -> bool:
    """Whether what the layer behind the last one that is journalled needs is on disk as it was written."""
    layer, rows = int(entry["layer"]) + 1, [r for r in range(len(stream.ids)) if r not in entry["excluded"]]
    own = all(stream.states[name][layer % 2].holds(rows, wanted) for name, wanted in entry["hidden"].items())
    return own and trials.kept(layer, entry["trials"])


def _losses(
    seen: Statistics, job: Job, specs: Mapping[str, WeightSpec], energies: Energies, team: Team
) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
    """Of the linears that share an input, by mix, in nats a token; and their weights [out, in] as a trial has them, for
    the leader of a team. Each of a team tries some of the mixes."""
    import torch

    from quantkit.solvers.group import FEWEST_TOKENS
    from quantkit.solvers.quadratic import row_losses
    from quantkit.solvers.restoring import restored

    seen.complete()
    every = dict.fromkeys(option for name in seen.weights for option in job.mixing.options(job.params, specs[name]))
    trials = {option: job.mixing.trial(job.params, option) for option in every}
    enough = seen.tokens >= FEWEST_TOKENS
    factor = next(iter(trials.values())).factor(seen.hessian) if enough else None  # the same for all
    found: dict[str, dict[str, float]] = {}
    other: dict[str, torch.Tensor] = {}
    for name, weight in seen.weights.items():
        rows = torch.arange(0, len(weight), -(-len(weight) // SAMPLE))
        some = weight[rows].float()
        weighing, energy, tokens = energies.take(name, seen)
        # The rows that stand for others do so in the sum of their gradients, too.
        share = 0.5 * float(weighing.sum()) / max(float(weighing[rows].sum()), 1e-300) / max(tokens, 1e-300)
        own: dict[str, float] = {}
        whole = _trial_mix(job, specs[name])
        options = job.mixing.options(job.params, specs[name])
        for number, option in enumerate(sorted(options, key=lambda mix: mix != whole)):
            if number % team.size != team.rank:  # the whole one is the leader's
                continue
            tried = weight.float() if option == whole else some
            if factor is None:
                coded = trials[option].nearest(name, tried, seen.hessian)
            else:
                coded = trials[option].solve(name, tried, seen.hessian, target=None, keep=None, factor=factor).coded
            value = restored(coded, weight.device)
            if option == whole:
                other[name], value = value.cpu(), value[rows]
            lost = row_losses(some - value, energy)
            own[option] = float(f"{float((lost * weighing[rows]).sum()) * share:.6g}")
        found[name] = own
    for theirs in team.gather(found):
        for name, own in theirs.items():
            found[name] |= own
    in_order = {
        name: {option: own[option] for option in job.mixing.options(job.params, specs[name])}
        for name, own in found.items()
    }
    return in_order, other


def _trial_mix(job: Job, spec: WeightSpec) -> str:
    """The mix in which a linear is written in a trial."""
    options = job.mixing.options(job.params, spec)
    return min(options, key=lambda mix: abs(job.mixing.cost(job.params, spec, mix) - TRIAL_BITS * spec.numel))
