"""Publication: a measured step becomes a record once, is judged, kept as the newest, written, and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from probe.capture.breaker import Breaker
from probe.diagnosis import Diagnosis
from probe.observation import Measured, Observation
from probe.records import Finding, StepRecord
from probe.sections.blocks import Section
from probe.sections.findings import events_section
from probe.sinks.run_folder import RunFolder
from probe.sinks.terminal import TerminalSink

Show = Callable[[StepRecord], Section]


class Publisher:
    """Holds the measured steps that wait, and publishes each once, in order: findings, newest record, run folder, sections.

    An error in a sink is said once and switches that sink off. On ranks other than 0 there is no folder and no terminal; records are
    made there too, because the merged record is what every rank decides by.
    """

    def __init__(
        self,
        observation: Observation,
        *,
        diagnosis: Diagnosis,
        folder: RunFolder | None,
        terminal: TerminalSink | None,
        sections: Callable[[int], Sequence[Show]],
        keep: Callable[[StepRecord, bool], None],
        write_kept: bool = False,
    ) -> None:
        """Publish records of ``observation``.

        Args:
            observation: Makes the records.
            diagnosis: Judges them.
            folder: Where they are written, or ``None``.
            terminal: Where sections are shown, or ``None``.
            sections: Gives, for the number of a step, what shows a section of it.
            keep: Takes the newest record, and whether any training forward was seen in its step.
            write_kept: Whether kept tensors are written to the folder.
        """
        self._observation = observation
        self._breaker: Breaker = observation.breaker
        self._diagnosis = diagnosis
        self._folder = folder
        self._terminal = terminal
        self._sections = sections
        self._keep = keep
        self._write_kept = write_kept
        self._waiting: list[Measured] = []
        self._unlogged: StepRecord | None = None

    def expect(self, measured: Measured) -> None:
        """Take a step whose numbers are on their way."""
        self._waiting.append(measured)

    def publish(self, *, logged: tuple[int, float] | None = None) -> None:
        """Publish every step that waits. Waits for their numbers if they are still under way.

        Args:
            logged: A step, and the training loss that the Trainer logs of that step alone.
        """
        waiting, self._waiting = self._waiting, []
        for measured in waiting:
            with self._observation.meter.section("publication"), self._breaker.guard("record"):
                alone = logged[1] if logged is not None and logged[0] == measured.step else None
                record, events = self._diagnosis.judge(self._observation.record(measured, logged=alone))
                self._keep(record, measured.forwards > 0)
                self._unlogged = record
                self._write(record, events, measured)
                self._diagnosis.tell(events)
                self._show(record, events)

    def take_for_log(self) -> StepRecord | None:
        """Return the newest record that no log has carried yet, once."""
        record, self._unlogged = self._unlogged, None
        return record

    def _write(self, record: StepRecord, events: Sequence[Finding], measured: Measured) -> None:
        if self._folder is None or self._breaker.is_off("run folder"):
            return
        with self._breaker.guard("run folder"):
            self._folder.write_findings(events)
            self._folder.write(record)
            if self._write_kept and measured.kept:
                self._folder.write_kept(record.step, measured.kept)

    def _show(self, record: StepRecord, events: Sequence[Finding]) -> None:
        if self._terminal is None or self._breaker.is_off("terminal"):
            return
        with self._breaker.guard("terminal"):
            told = [events_section(record.step, events)] if events else []
            sections = [*told, *(show(record) for show in self._sections(record.step))]
            if sections:
                self._terminal.show(sections)
