"""docs/levels.md: what the five levels are and why they cost what they cost, and tables of what was measured."""

from __future__ import annotations

from pathlib import Path

from reimplementation.bench import results
from reimplementation.bench.page import paragraph
from reimplementation.bench.results import Document
from reimplementation.bench.tables import machine_line

from .measure import Figure
from .tables import FORMULAS, by_op, markdown

PAGE = """\
# One op at five levels

`python -m reimplementation levels` runs one function on the same inputs five times: written in eager PyTorch, compiled
by TorchScript, compiled by `torch.compile`, written in Triton, and written in C++ and CUDA. This page says what each
level can do and what it cannot, and why. Who has never written a kernel should be able to read our CUDA files after
it.

The command `python -m reimplementation levels --page benchmarks/levels > docs/levels.md` writes this page, with the
figures of the files in [benchmarks/levels](../benchmarks/levels); whatever is edited here by hand is lost.

## The function

Deformable aggregation and multi-scale deformable attention do the same to different tensors. For every query there is
a list of *samples*. A sample is a place in a feature map and a weight. The four pixels around the place, its
*corners*, are read, each a row of channels; they are averaged according to how near they are, the average is
multiplied with the weight, and the products of all samples are added up:

```
query 17   sample 0: level 2, x 0.31, y 0.70, weight 0.08  ->  4 rows of 256 channels  ->  * 0.08  ---+
           sample 1: level 0, x 0.33, y 0.69, weight 0.11  ->  4 rows of 256 channels  ->  * 0.11  ---+--> 256 channels
           ...                                                                                        |
```

There is next to no arithmetic in it: a multiplication and an addition for each number that is read. What has to be
done is to *read rows from places that are known only when the program runs*. The least that anybody can do is to read
each row once and to write the output once. The levels differ in what they read and write beyond that, in who decides
what happens next, and in how often somebody has to start something on the GPU.

The backward has three results. The gradients of a sample's weight and place come from the same rows, multiplied with
the output's gradient: they belong to that sample alone. The gradient of the features is the opposite of a gather:
every sample *adds* to four rows, and many samples may want to add to one row at a time.

## Level 1: eager

[eager.py](../reimplementation/bench/levels/eager.py). Python holds the control. Each line calls an operator; the
operator reads whole tensors, computes, and writes a whole tensor, which the next line reads again:

```
features --transpose--> images --grid_sample--> samples --* weights--> products --sum--> output
              |                      |                        |
           written                written                  written, and read again by the next
```

`grid_sample` itself is a good kernel. What it cannot know is that its result will be weighed and summed, so it writes
every sample, channel by channel, for the next operator to read. It also knows nothing of points that no camera sees: a
sample outside the image is a row of zeros, which is written, multiplied and added like any other. On a car with six
cameras five in six samples are of that kind. And it wants images with channels first, where the four corners of one
channel lie together and the channels of one pixel do not: one thread takes one number, and a row is gathered from as
many places as it has channels.

The backward runs the same way in the other direction, and has to find all that the forward wrote: autograd keeps it.

- What it can do: everything. Any device, any dtype, second derivatives; every line can be looked at in a debugger.
- What it costs: memory traffic of many times the rows, memory to hold it, and a launch a line and level.

## Level 2: TorchScript

[torchscript.py](../reimplementation/bench/levels/torchscript.py). The functions are those of level 1. TorchScript
translates them to a program of its own that calls the same operators without Python. Its fuser joins neighbouring
arithmetic, but `grid_sample` is no arithmetic to it, so that what is read and written stays the same. Where Python was
not what one waited for, nothing is gained.

TorchScript is here as history: PyTorch has deprecated it in favour of `torch.compile` and `torch.export`, and the
command shows the warning that says so.

## Level 3: torch.compile

[compiled.py](../reimplementation/bench/levels/compiled.py). Dynamo records which operators a call runs, and Inductor
writes new kernels for the record: for a GPU in Triton, for a CPU in C++. It *fuses*: where the result of one operator
is what the next one reads, number by number, both become one kernel, and nothing in between is written.

Two forms of the function are compiled, because what Inductor can fuse depends on how it is said.

- **grid_sample**, from level 1. In the forward Inductor replaces `grid_sample` by its definition: floor, four loads,
  four products. That could be fused with the weights and the sum, but a formula may not grow without end: after three
  corners Inductor stores what it has. On the H200 that is, for each sample and each of its channels, the sum of the
  three, column and line of the fourth as 64-bit integers, and the fourth's weight: 24 bytes, where `grid_sample` writes
  4. The forward takes longer than that of level 1. The backward of `grid_sample` has no such definition in PyTorch
  2.13: Inductor calls the eager kernel, before and after which everything is written to memory.
- **gathers**, [gather.py](../reimplementation/ops/backends/gather.py). The corners are written out with `gather`,
  whose backward is a scatter with addition, and that Inductor can write. Corners are stacked, since a stack is stored:
  what a sample's channels have in common is computed once. Sixteen rows, those of attention at one level, are then
  gathered and added up in one kernel; the 312 of aggregation Inductor stores, to add them up afterwards. It is what our
  package runs where a compiler traces the call and there are no kernels.

Inductor decides number by number: a kernel is a formula for one element of its result. It does not know that the
channels of one sample have coordinates in common, unless they are stored; it does not skip what a condition makes
zero; and a sum over many samples is split into passes. The first call takes as long as a compiler.

- What it can do: most of the fusion, for no work. New shapes compile again, or come with symbols for sizes.
- What it costs: seconds at the first call, and what a formula an element cannot say. And somebody has to look at the
  numbers: when our gathers still moved the heads ahead of the queries, a kernel of Inductor's read its input as if it
  lay in another order, and what came out was wrong, without a word. The errors in the tables below are how we found it.

## Level 4: Triton

[deformable_aggregation.py](../reimplementation/ops/backends/triton/deformable_aggregation.py) and
[ms_deform_attn.py](../reimplementation/ops/backends/triton/ms_deform_attn.py). Now we decide who does what. The work
is cut into *programs*, and a program handles *tiles*: blocks of numbers with a shape, on which every operation works
at once. Triton decides which thread holds which number of a tile, and how threads exchange numbers where a sum needs
it.

```
aggregation   program = one query, four of its groups of channels

              32 pairs of camera and point at once:    a thread a pair: is it seen?
              for every pair that is:                  uniform: the whole program goes one way
                  tile = 4 levels x 4 groups x 32 channels
                         +--------------------------+
                         | coarse level             |  place and weight of a level: computed once for its
                         | ...                      |  channels; a load brings 16 bytes for each thread,
                         | fine level               |  neighbours from neighbours
                         +--------------------------+
                  total += weight * (the four corners' average)
              output = sum of the total over levels    threads exchange numbers of tiles here alone
```

The whole forward is one kernel. Nothing is written but the output, and of what no camera sees, five pairs in six, a
thread reads a location and nothing else. In the backward the program has its rows once more, multiplies them with the
output's gradient, and owns the gradients of its weights and places. The features' gradient it adds to memory with
*atomic* additions, which the GPU's L2 cache carries out one after the other where they meet. They come in any order,
so the last bits of the result differ from run to run; and each sample sends four rows to the cache, as many as it
reads.

- What it can do: fuse everything, skip what is not needed, choose what is kept in registers. It runs on every GPU that
  Triton knows, with no compiler installed, and `torch.compile`, `torch.export` and AOTInductor see its kernels.
- What it costs: which thread has what is not ours to say. The coordinates of a sample are computed by every thread
  that shares the sample's row. Sizes of tiles are powers of two, so that 3 levels take as long as 4. A tile cannot be
  addressed at a place that is computed, so threads cannot hand each other lists of what is left to do: the next pair
  that is seen is the smallest number of those left, which all threads search together, each time. The order of atomic
  additions cannot be chosen; and Python launches the kernel, which takes the host longer than the launch of a
  kernel in C++.

[docs/triton.md](triton.md) has the backend, its limits and its design.

## Level 5: C++ and CUDA

[aggregation](../reimplementation/ops/csrc/aggregation) and [attention](../reimplementation/ops/csrc/attention). Now we
say what each thread does. The head of every file tells how threads map to data; with this page it reads as a change of
the last picture. Open [forward.cu](../reimplementation/ops/csrc/aggregation/forward.cu) beside it:

```
aggregation   block of 128 threads = one query; shared memory = a desk at which they work together

  step 1      a thread a pair of camera and point: is it seen?     -> list of the pairs that are, on the desk
  step 2      a thread a sample: corners and their weights         -> four rows and four weights each, on the desk
  step 3      teams of 32 threads, a team a sample at a time:      read the sample from the desk, then the rows:
              thread 0 channels 0..3, thread 1 channels 4..7, ...  16 bytes each, neighbours from neighbours
  the end     teams add up what they have                          -> one output, written once
```

- **A list on the desk** is what Triton cannot express. In step 1 every thread looks at another pair, as at level 4, but
  it leaves what it found in a list without holes, so that step 3 knows the next samples long before it comes to them.
- **Arithmetic once a sample**, not once a thread: step 2 works a sample's coordinates out in one thread, and step 3
  only reads them.
- **Loads in flight.** A row takes hundreds of cycles to arrive. What counts is how many loads a multiprocessor has on
  their way meanwhile, and that depends on how many registers a thread needs. In CUDA that number can be watched and
  bounded.
- **No atomics.** The features' gradient is summed where it belongs: samples are put in order by the pixels that they
  touch, a team takes a tile of 4 x 4 pixels, and adds up whatever touches it in shared memory
  ([features-gradient.md](kernels/features-gradient.md)). A row of the output's gradient is read once a sample instead
  of four rows being sent, and the same bits can be had every time.

On a CPU the level is C++: threads share out the queries, vector instructions take eight or sixteen channels at a time,
and the rows of what is not seen are not read there either.

- What it can do: whatever the machine can.
- What it costs: the lines of code, the months, a compiler, and a binary for each kind of machine.
  [kernels/index.md](kernels/index.md) tells how much was tried for it.

## Who does what

| | control | fused | in memory between the operators | who pays at a launch |
| --- | --- | --- | --- | --- |
| 1 eager | Python, an operator a line | nothing | every sample, several times | \
Python and the dispatcher, for each operator |
| 2 TorchScript | PyTorch's interpreter | arithmetic | every sample, several times | \
the interpreter, for each operator |
| 3 torch.compile | generated code | what is a formula an element | \
what long formulas and sums are cut into, and what grid_sample's backward needs | generated code, for each kernel |
| 4 Triton | our program, by tiles | everything | \
nothing; half-precision gradients are summed in a float32 copy | Python, once |
| 5 C++ and CUDA | our program, by threads | everything | nothing but lists of numbers in the backward | C++, once |

## Figures

{figures} {formulas}

## Measure again

A machine has one file, and a picture of the same name beside it. On an idle machine:

```sh
python -m reimplementation levels --device cpu \\
  --json benchmarks/levels/cpu-2-cores.json --picture benchmarks/levels/cpu-2-cores.png
python -m reimplementation levels --device cuda \\
  --json benchmarks/levels/nvidia-h200.json --picture benchmarks/levels/nvidia-h200.png
python -m reimplementation levels --page benchmarks/levels > docs/levels.md
```

What an earlier run left in PyTorch's cache of compiled code makes the first call of level 3 shorter; the committed
figures were taken with an empty one, `TORCHINDUCTOR_CACHE_DIR` naming a new folder. """
SIZES = {
    "cuda": "Aggregation is SparseDrive's: 900 queries of 13 points, six cameras of four levels, 256 channels in 8 "
    "groups. Attention is a layer of Deformable DETR's encoder, batch 2.",
    "cpu": "Aggregation has 300 queries of 13 points, six cameras of two levels, 128 channels in 8 groups; attention "
    "is a layer of Deformable DETR's decoder, 900 queries, batch 1.",
}


def render(folder: Path) -> str:
    """The page, with the figures of every JSON file in a folder.

    Raises:
        ValueError: there is no file, or one holds something else.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"there are no figures in {folder}")
    figures = [_figures(path, results.read_one(path, Figure)) for path in files]
    return PAGE.format(figures="\n".join(figures), formulas=paragraph(FORMULAS))


def _figures(path: Path, document: Document) -> str:
    kinds = dict.fromkeys(figure.device.partition(":")[0] for figure in document.results)
    parts = [f"### {document.machine['device']}", f"{machine_line(document)}, float32."]
    parts += [paragraph(SIZES[kind]) for kind in kinds if kind in SIZES]
    if path.with_suffix(".png").exists():
        picture = f"../{'/'.join(path.parts[-3:-1])}/{path.stem}.png"
        parts.append(f"![Where the time of each level goes, and the memory that it takes]({picture})")
    for op in by_op(document):
        parts += [f"#### {op}", markdown(document, op)]
    return "\n\n".join(parts) + "\n"
