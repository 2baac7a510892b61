"""The training: step after step, from the last checkpoint on.

All that is drawn at random in a step follows from the seed and the step's number, and all that one step hands to the
next is in the checkpoint. So a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reimplementation.models.sparsedrive import SparseDrive, TemporalState
from reimplementation.models.sparsedrive.denoising import DenoisingState
from reimplementation.models.sparsedrive.detector import State

from . import checkpoint
from .averaging import ParameterAverage
from .batches import Batch, HeldOutFrames, slots_of
from .building import compile_parts, distributed, held_out_frames, new_model, share_norms, training_frames
from .config import TrainingConfig
from .graphs import GraphedNetwork
from .held_out import judge, moments
from .journal import Journal
from .optimization import load_state, make_optimizer, rate_factor, set_rate, step_unless
from .processes import Process
from .recomputation import recompute
from .stopwatch import Stopwatch

STATES = {"det": TemporalState, "map": TemporalState, "denoising": DenoisingState}
# What may be another in the configuration when a training goes on.
MAY_CHANGE = ("evaluate_every", "checkpoint_every", "keep_checkpoints", "compile", "graph", "recompute")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after how many steps, whether these were all, and the checkpoint of it."""

    step: int
    is_finished: bool
    checkpoint: Path


class Training:
    """A training in a folder, new or gone on with.

    Args:
        config: what to train; of the folder's training, if there is one.
        folder: for checkpoints and metrics.
        process: of one, or of several that share each batch.
        data: a folder of frames, as `Recordings` reads it; None: synthetic drives.

    Raises:
        ValueError: the folder holds a training of another configuration, or the data cannot be read.
    """

    def __init__(self, config: TrainingConfig, folder: Path, process: Process, data: Path | None = None):
        self.config, self.folder, self.process, self.data = config, folder, process, data
        if config.graph and process.device.type != "cuda":
            raise ValueError(f"graph is for a GPU; got {process.device}: choose one, or set graph to false")
        self.slots = slots_of(process.rank, process.world_size, config.batch_size)
        folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.load_newest(folder)
        self.frames = training_frames(config, data, self.slots, process.device)
        self.model = new_model(config, None if found else self.frames).train().to(process.device)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.state: State = self.model.initial_state(len(self.slots))
        decay = config.average_decay
        self.average = None if decay is None else ParameterAverage(self.model, decay)
        self.step = 0
        self._go_on_from(found)
        if config.recompute:
            recompute(self.model)
        share_norms(self.model, process)
        self.network: Callable = self.model if config.graph else distributed(self.model, process)
        compile_parts(self.model, config.compile)
        self._upcoming: tuple[int, Batch] | None = None
        self._beside = torch.cuda.Stream(process.device) if process.device.type == "cuda" else None

    def run(self, on_step: Callable[[dict], None], is_stopped: Callable[[], bool]) -> Outcome:
        """Train until the last step, or until ``is_stopped`` says so; what was done is in a checkpoint then.

        Args:
            on_step: is told the numbers of every step, in the first process.
            is_stopped: is asked after every step.

        Raises:
            CheckpointError: a checkpoint could not be written.
            RuntimeError: the loss is no finite number.
        """
        journal = Journal(self.folder, self.step) if self.process.is_first else None
        self.stopwatch = Stopwatch(self.process.device)
        stopped, saved = False, None
        if self.config.graph and self.step < self.config.num_steps:
            self._capture()
        try:
            while self.step < self.config.num_steps and not stopped:
                row, stopped = self._one_step(is_stopped)
                if self._is_judged_after(self.step) and not stopped:
                    row |= self._judge()
                if journal is not None:
                    journal.write(row)
                    on_step(row)
                self.step += 1
                ends = stopped or self.step == self.config.num_steps
                saved = self.save() if ends or self.step % self.config.checkpoint_every == 0 else None
        finally:
            if journal is not None:
                journal.close()
            if self.config.graph:
                self._let_go_of_graphs()
        if saved is None and (saved := checkpoint.newest(self.folder)) is None:
            saved = self.save()
        return Outcome(self.step, self.step == self.config.num_steps, saved)

    @functools.cached_property
    def held_out(self) -> HeldOutFrames:
        """What the detector is judged by; opened when it is first asked for."""
        return held_out_frames(self.config, self.data, self.process.device)

    def judged_model(self) -> SparseDrive:
        """The detector as it is judged: with the average of its parameters, where there is one."""
        model = SparseDrive(self.config.model)
        averages = {} if self.average is None else self.average.state_dict()
        model.load_state_dict(self.model.state_dict() | averages)
        return model.to(self.process.device)

    def save(self) -> Path:
        """Write a checkpoint, in the first process; the others wait."""
        state = {name: _fields(remembered, self.process) for name, remembered in self.state.items()}
        path = self.folder
        if self.process.is_first:
            document = {
                "step": self.step,
                "config": self.config.to_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "state": state,
            }
            if self.average is not None:
                document["average"] = self.average.state_dict()
            path = checkpoint.save(self.folder, self.step, document, self.config.keep_checkpoints)
        self.process.wait()
        return path

    def _is_judged_after(self, step: int) -> bool:
        every, done = self.config.evaluate_every, step + 1
        return every is not None and (done % every == 0 or done == self.config.num_steps)

    def _judge(self) -> dict[str, float]:
        """How good the detector is by now, told by the first process while the others wait."""
        found: dict[str, float] = {}
        if self.process.is_first:
            seen = moments(self.judged_model(), self.held_out, self.process.device, self.config.precision)
            found = judge(seen, self.config.model).summary()
        self.process.wait()
        self.stopwatch = Stopwatch(self.process.device)  # none of this is a step's time
        return found

    def _one_step(self, is_stopped: Callable[[], bool]) -> tuple[dict, bool]:
        """The numbers of a step, and whether the training is to stop.

        The host reads the loss at the end, when it has handed all of the step's work to the GPU, and the drawing of the
        next batch. A step that would spoil the parameters is passed over before the host knows.
        """
        config = self.config
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 1009 + self.process.rank)
        batch = self._take_batch()
        factor = rate_factor(self.step, config.num_steps, config.optimizer)
        set_rate(self.optimizer, factor)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            outputs, self.state = self.network(batch.images, batch.metas, self.state, batch.targets)
        self.stopwatch.ends("forward")
        if self.step + 1 < config.num_steps:
            self._upcoming = self.step + 1, self._prepare(self.step + 1)
        self.stopwatch.ends("data")
        terms = self.model.loss(outputs, batch.targets)
        self.stopwatch.ends("loss")
        torch.stack(list(terms.values())).sum().backward()
        if config.graph:  # which no hook of a parameter interrupts, so that nothing was shared on the way
            self.process.share_gradients(self.model.parameters())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.max_norm)
        self.stopwatch.ends("backward")
        numbers = torch.stack([*terms.values(), norm, norm.new_full((), is_stopped())]).detach()
        shared = self.process.mean(numbers)
        step_unless(self.optimizer, ~shared.isfinite().all())
        if self.average is not None:
            self.average.update(self.step)
        self.stopwatch.ends("optimizer")
        *values, norm_value, stops = shared.tolist()
        times = self.stopwatch.read()
        self._check(dict(zip(terms, values)), norm_value)
        row = {"step": self.step, "loss": sum(values), **dict(zip(terms, values)), "grad_norm": norm_value}
        row |= {"lr": config.optimizer.lr * factor, "seconds": sum(times.values())}
        if self.process.device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated(self.process.device) / 1e9
        return row | {f"seconds_{phase}": seconds for phase, seconds in times.items()}, stops > 0

    def _capture(self) -> None:
        """Have the network captured with the batch that comes next."""
        if not isinstance(self.network, GraphedNetwork):
            # PyTorch's function that makes the graphs keeps nodes of its own stream, of which PyTorch then warns.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
            self._upcoming = self.step, self._prepare(self.step)
            torch.cuda.synchronize()
            self.network = GraphedNetwork(self.model, self._upcoming[1], self.state, self.config.precision)

    def _let_go_of_graphs(self) -> None:
        """Leave no graph behind: NCCL does not end before those that hold work of it do (from 2.26 on)."""
        self.network = self.model
        gc.collect()  # PyTorch's callables that hold the graphs refer to themselves

    def _take_batch(self) -> Batch:
        """This step's batch, which the step before has prepared unless it was another run's."""
        if self._upcoming is None or self._upcoming[0] != self.step:
            self._upcoming = self.step, self._prepare(self.step)
        (_, batch), self._upcoming = self._upcoming, None
        if self._beside is not None:
            torch.cuda.current_stream().wait_stream(self._beside)
        self.stopwatch.ends("data")
        return batch

    def _prepare(self, step: int) -> Batch:
        """A step's batch. A GPU makes it beside its other work, which nothing here waits for."""
        if self._beside is None:
            return self.frames.at(step)
        with torch.cuda.stream(self._beside):
            return self.frames.at(step)

    def _check(self, terms: dict[str, float], norm: float) -> None:
        """Raise where the step would spoil the parameters; every process sees the same numbers, and raises."""
        wrong = [
            name for name, value in {**terms, "the gradient's norm": norm}.items() if not abs(value) < float("inf")
        ]
        if wrong:
            last = checkpoint.newest(self.folder)
            raise RuntimeError(
                f"step {self.step}: not a finite number: {', '.join(wrong[:5])}. The parameters are as before "
                f"it, and the last good checkpoint is {last or 'none yet'}; a lower learning rate or a longer warm-up "
                "may help"
            )

    def _go_on_from(self, found: tuple[Path, dict] | None) -> None:
        if found is None:
            return
        path, document = found
        ours, theirs = (
            {k: v for k, v in values.items() if k not in MAY_CHANGE}
            for values in (self.config.to_dict(), document["config"])
        )
        if ours != theirs:
            different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            raise ValueError(
                f"{path} is of a training with other settings ({', '.join(different)}); choose another folder, or the "
                "configuration that it began with"
            )
        self.model.load_state_dict(document["model"])
        load_state(self.optimizer, document["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(document["average"])
        self.step = document["step"]
        own = slice(self.slots.start, self.slots.stop)
        self.state = {
            name: STATES[name](**{key: value[own].to(self.process.device) for key, value in remembered.items()})
            for name, remembered in document["state"].items()
        }


def _fields(state: TemporalState | DenoisingState, process: Process) -> dict[str, Tensor]:
    """A state's tensors by name, of all samples of the batch."""
    return {name: process.joined(value) for name, value in state._asdict().items()}
