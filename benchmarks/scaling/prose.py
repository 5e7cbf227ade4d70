"""The text of docs/scaling.md between its tables, with places for figures."""

from __future__ import annotations

ABOUT = """\
# Scaling

Made by `make scaling`; do not edit. What a sampled step costs on 8 to 16,384 ranks and in models of 70 billion parameters: **computed**,
from what was **counted** (the layouts of such models, made on the `meta` device, where they take no memory) and what was **measured**.
No run of this size was made. The last section says what follows from which.

{measured}"""

MEASURED = "Measured: {source}, {versions}."

UNMEASURED = "Nothing measured is shown: `make bench-units` has not been run, and what follows is counted and computed alone."

ASSUMED = "## Assumptions"

LAYOUT = """\
## What a sampled step sends

Two all-reduces of fixed size, float64, whatever the batch and the number of ranks; an unsampled step sends nothing."""

COLLECTIVES = """\
## Time of the two all-reduces

For the last model of the table. A ring's latency grows with the ranks, a tree's with their logarithm; at this size the bytes hardly
matter. The share is of training time at the default cadence: of {cadence} steps of {step:.2g} s."""

COLLECTIVES_END = """\
NCCL takes trees where latency decides, so the tree's column is the one to expect. With `stop_on`, one more all-reduce of one number
follows at the step after. Sources: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005
(ring); Sanders, Speck, Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009 (trees)."""

GLOO = "Measured, both all-reduces together, between gloo processes of the one machine (which share its cores):"

AGREEMENT = """\
## Agreement when training begins

Once per `train()`. Every rank writes one key (a digest of its layout, its cadences); rank 0 reads those of all others, and writes the
decision; three more keys hold count, claim and decision. **That is linear in the ranks for rank 0**, and constant for every other.
Measured by the agreement's own code on this machine's TCPStore, with the keys of the others already there: {us:.3g} µs a rank at the
largest sizes."""

AGREEMENT_END = """\
While they wait, ranks ask for the decision at most every 0.25 s: up to {asked:,} requests a second at {world:,} ranks, against some
{rate:,.0f} a second that one client got answered here ({request_us:.0f} µs a request). A server no faster than that is kept busy by those
who wait, and rank 0 takes longer than the table says. It stays bounded: after 30 s (rank 0) and 60 s (the others) each rank goes on with
its own numbers, and says so."""

WORK = """\
## What a rank computes

One micro-batch: {tokens:,} tokens for the language model, 8 clips of 30 s for Whisper. The plain step is three times the operations of
the forward, counted, at the assumed arithmetic.

* Statistics read the output of every site once.
* A head costs {heads}.
* Each call of an attention layer adds {a_layer:.0f} operations, and {fixed:.0f} are fixed: counted on the eager path (the fused kernel of a
  GPU needs fewer), and launched one after the other as if nothing overlapped. A GPU that is kept busy by a step of this size hides much
  of that; how much is not known without one. Attention rows are 64 a layer whatever the batch: their time is that of their launches."""

OVER_LOSS = "{over_loss:.2g} times the cross-entropy itself (measured), which reads the logits three times in fp32"

MEMORY = """\
## Memory

The buffer's budget (64 MiB by default) does not depend on model, batch or ranks, and temporaries are worked in blocks. Measured: the
peak of a sampled step less the peak of the plain one, and the most that one part held beside what was there."""

FILES = """\
## Files

Rank 0 writes alone: `run.json`, `records-rank00000.jsonl` and `findings.jsonl`, three files a run however many ranks. A record grows
with the number of cells ({a_cell:.0f} bytes each). Ten thousand records, a million steps at cadence {cadence}, of the last model are
{gb:.1f} GB."""

HONEST = """\
## What is measured, counted, assumed

* **Counted**, exactly: columns and bytes of the layouts, bytes of the outputs of the sites, operations of a forward, operations that the
  probe adds. They hold for the versions above.
* **Measured**, on the one machine named above: unit times, the store, gloo between its own processes, bytes of records, memory at the
  peak. Bytes of the records of models of this size are extrapolated from those of small ones.
* **Assumed**: everything in the table of assumptions. The figures for 8 ranks and more are arithmetic on it.
* **Not covered**: a real network with other traffic; a straggler (the all-reduces wait for the slowest rank, as the training's own
  all-reduce of the gradients has just done, and as its next one would); NCCL's own choice of algorithm, which can only do better inside a
  node. With weights sharded over ranks (FSDP, ZeRO-3) gradients by part and updates are not measured, and said so; their columns stay in
  the layout. With tensor parallelism each rank sees its own heads."""
