"""The life of a BOINC task: what is done next, what the client is told, and how it ends. A state machine.

In: words of the client, the clock, and how each step of the work ended. Out: the name of the next step
(boincwork.py does it), the status that the client shows, and at last an `End`. Steps are done one at a time
on another thread; nothing waits here, so the client's words are heard while a step goes on.

Only the failure of the science itself is an error. All else ends the process for a while: with a reason in
plain words, and 60 s that double up to an hour.

What it is not: shared memory and files (boincslot.py), or calls (boincwork.py). No threads, no clock of its
own.
"""

import contextlib
import logging
from typing import Any, NamedTuple, Optional, Tuple

import agent
from boinchost import Trouble
from boincjob import Job, Trigger
from boincslot import Record
from boincwork import Look
from faults import AgentNotConnected, DeadlineExceeded, VMHostError
from hostclient import NoHost

log = logging.getLogger('vmboinc')

ABORTED, SIGNALLED, INIT_FAILURE = 194, 193, 206       # exit codes, as BOINC has them
NOT_REACHED = (AgentNotConnected, DeadlineExceeded)
NO_PROGRAM = ('ENOENT', 'EACCES', 'ENOEXEC', 'ENOTDIR')
LOOK_EVERY = 1.0               # seconds between two looks at the science
QUICK = 0.3                    # … and at what is soon so
QUIT_WITHIN = 50.0             # seconds in which a client's <quit/> is answered: it kills after 60
FIRST_DELAY, LONGEST_DELAY = 60, 3600          # seconds of a temporary exit
LONGEST_PAUSE = 86400          # seconds that a client takes
TOLD_AFTER = 60.0              # … after which it is told that it is waited for
READY_WITHIN = 900.0           # seconds that a machine may take until its agent is there
AWAY_TRIES = 5                 # times that a host agent or a machine may be lost without an exit
LEAST_FRACTION = 0.001         # told before the science tells its own: for 0, a client shows a guess, and
                               # would go back from it
NO_FRACTION = -1.0             # has a client show its guess
SILENT_FOR = 60.0              # seconds of science after which its progress isn't waited for any more
MOST_NOTED = 40                # times that a client's suspend and resume are noted
GOOD_RUN = 60.0                # seconds of science after which earlier troubles count no more


class End(NamedTuple):
    """How the process ends."""
    code: int = 0
    finish: bool = False               # the task is over, and the code is its own
    delay: float = 0.0                 # else, where above 0: start it again in so many seconds …
    message: str = ''                  # … and why; or what a finished task says to the user
    notice: bool = False
    signal: int = 0                    # this process dies of it


class Life:
    """One run of the wrapper. Times are monotonic seconds."""

    # Each once the one before is so.
    RUNNING = ('connect', 'clean', 'ready', 'put', 'begin', 'limit', 'show_desktop', 'look')
    AT_WORK = ('look', 'checkpoint')
    ENDING = ('collect', 'remove')

    def __init__(self, job: Job, record: Record, now: float, period: float = 300.0) -> None:
        """
        period    seconds between two checkpoints, as the client's user wants them
        """
        self.end: Optional[End] = None
        self.wish = 'run'              # then suspend, run again, quit, abort
        self.messages: Tuple[str, ...] = ()            # for the channel of trickle messages
        self._job = job
        self._record = record
        self._period = period
        self._todo = list(self.RUNNING)
        self._step = ''                # the one that is under way
        self._not_before = now         # when the next one may begin
        self._asked = now              # when the wish came that holds now
        self._waits_since = now        # since when the step that comes next isn't so
        self._last = now               # when elapsed time was counted last
        self._checkpointed = now
        self._is_paused = self._is_connected = self._has_looked = self._complained = False
        self._is_queued = self._has_waited = self._has_knocked = self._is_home = False
        self._fraction = record.fraction
        self._lost = self._heard = 0
        self._ran = 0.0
        self._final: Optional[End] = None              # once what comes before it is done

    # What comes in.

    def hear(self, word: str, now: float) -> None:
        """A word of the client."""
        if word == 'reread_app_info':
            self._change_limits()
        wish = {'suspend': 'suspend', 'resume': 'run', 'quit': 'quit', 'abort': 'abort'}.get(word)
        if wish and self.wish not in ('abort', wish) and not (self.wish == 'quit' and wish != 'abort'):
            self._note(word)
            self.wish, self._asked, self._not_before = wish, now, now

    def _note(self, word: str) -> None:
        """A word of the client, for stderr.txt, of which a project sees the last 63 KB: some clients suspend
        and resume a task each second or two, for days."""
        self._heard += word in ('suspend', 'resume')
        if self._heard <= MOST_NOTED or word not in ('suspend', 'resume'):
            log.info('the client says %s', word)
        if self._heard == MOST_NOTED:
            log.info('from now on, that it says suspend or resume isn\'t noted any more')
            self._heard += 1

    def _change_limits(self) -> None:
        if self._todo[0] in self.AT_WORK:
            self._todo.insert(0, 'limit')

    def next(self, now: float) -> str:
        """The step to begin now; '' for none yet. It ends with ``succeeded`` or ``failed``."""
        self._count_time(now)
        if self._is_overdue(now):
            self._leave_for(self.wish)
        if self.end or self._step or now < self._not_before:
            return ''
        self._step = getattr(self, '_next_' + self.wish)()
        return self._step

    def _is_overdue(self, now: float) -> bool:
        return self.wish in ('quit', 'abort') and now - self._asked > QUIT_WITHIN

    def _next_run(self) -> str:
        return 'resume' if self._is_paused else self._todo[0]

    def _next_suspend(self) -> str:
        """What isn't there yet isn't made, what boots or runs is paused; what ended may be brought home."""
        if self._is_paused:
            return 'stay'
        if self._todo[0] in ('connect', 'clean') + self.ENDING:
            return self._todo[0]
        return 'pause' if self._record.made else ''

    def _next_quit(self) -> str:
        if not self._record.made or not (self._is_connected or self._lost):
            self._leave_for('quit')
            return ''
        if not self._is_connected:
            return 'connect'
        return 'remove' if self._is_home and self._todo[0] == 'remove' else 'save'

    def _next_abort(self) -> str:
        if not self._record.made:
            self._leave_for('abort')
            return ''
        return 'remove' if self._is_connected else 'connect'

    def _leave_for(self, wish: str) -> None:
        final = self._final
        if final and final.finish and not self._is_home:       # a client would miss its outputs: an error
            final = None
        self.end = self.end or (End(ABORTED) if wish == 'abort' else final or End())

    # How a step ended.

    def succeeded(self, value: Any, now: float) -> None:
        """The step that was under way gave this."""
        step, self._step = self._step, ''
        if isinstance(value, Look):
            self._saw(value, now)
        elif not value:
            self._not_before = now + QUICK
            if step == 'ready' and now - self._waits_since > READY_WITHIN:
                self._trouble('the machine\'s agent isn\'t there after %d minutes: does its image, or the '
                              'machine that is to join, start vmguest?' % (READY_WITHIN / 60))
            elif step == 'ready' and now - self._waits_since > TOLD_AFTER and not self._has_waited:
                self._has_waited = True
                log.info('the machine\'s agent isn\'t there yet')
        else:
            getattr(self, '_did_' + step, self._did)(step, now)

    def _did(self, step: str, now: float) -> None:
        """The first of what is to be done is done."""
        if self._todo[0] == step:
            self._todo.pop(0)
        self._waits_since = now

    def _did_connect(self, step: str, now: float) -> None:
        self._is_connected = True
        self._did(step, now)

    def _did_pause(self, step: str, now: float) -> None:
        self._is_paused, self._has_knocked = True, False

    def _did_stay(self, step: str, now: float) -> None:
        self._not_before = now + LOOK_EVERY

    def _did_resume(self, step: str, now: float) -> None:
        self._is_paused = False
        self._last = self._waits_since = now

    def _did_save(self, step: str, now: float) -> None:
        self._checkpoint(now)
        self._leave_for(self.wish)

    def _did_checkpoint(self, step: str, now: float) -> None:
        self._did(step, now)
        self._checkpoint(now)

    def _did_collect(self, step: str, now: float) -> None:
        self._is_home = True
        self._did(step, now)

    def _did_remove(self, step: str, now: float) -> None:
        self._record.made = False
        self._checkpoint(now)          # told with the end: a client that ends just then shows what it stored
        self._leave_for(self.wish)

    def failed(self, error: Exception, now: float) -> None:
        """The step that was under way raised this."""
        step, self._step = self._step, ''
        if step == 'checkpoint' and not isinstance(error, NoHost):
            log.warning('no checkpoint: %s', error)    # the next one is as good
            self._did(step, now)
            self._checkpointed = now
        elif isinstance(error, NoHost) and step in ('save', 'remove') and self._lost < AWAY_TRIES:
            self._try_again(step, now)
        elif isinstance(error, NOT_REACHED) and self.wish != 'run':
            self._knock(step, error, now)
        elif self.wish in ('quit', 'abort'):
            log.warning('%s: %s', step, error)         # the lease, and the cleanup, take care of it
            self._leave_for(self.wish)
        elif step == 'remove':
            log.warning('the machine is left for the next cleanup: %s', error)
            self._did_remove(step, now)
        elif isinstance(error, NoHost):
            self._begin_anew('the host agent went away', now)
        elif isinstance(error, Trouble):
            self._trouble(str(error))
        elif isinstance(error, VMHostError):
            self._begin_anew('%s: %s' % (step, error), now)
        else:
            self._trouble('%s: %s' % (step, _why(error)))

    def _try_again(self, step: str, now: float) -> None:
        """The last step failed since the host agent went away: another one does it."""
        log.warning('the host agent went away before the step %s', step)
        self._lost += 1
        self._is_connected = False
        self._todo = ['connect', step]
        self._not_before = now + QUICK

    def _knock(self, step: str, error: Exception, now: float) -> None:
        """The machine's agent doesn't hear the last step: it may in a moment, as after a host agent that was
        killed. Until then its program goes on, and on a machine without a lease it would for as long as the
        client is away, or has the task suspended."""
        if not self._has_knocked:
            log.warning('%s: %s', step, error)
        self._has_knocked = True
        self._not_before = now + LOOK_EVERY

    def _begin_anew(self, why: str, now: float) -> None:
        """Looks again what is there, and does what is missing. More than some times in a row is a trouble."""
        log.warning('%s', why)
        self._lost += 1
        if self._lost > AWAY_TRIES:
            self._trouble(why)
        self._todo = list(self.RUNNING if self._todo[0] not in self.ENDING else
                          ('connect', 'ready', 'look'))
        self._is_connected = self._is_paused = False
        self._waits_since, self._not_before = now, now + LOOK_EVERY

    def broke(self, error: Exception) -> None:
        """This process can't go on, since its disk is full, say: none of it is the science's fault."""
        self._trouble('vmboinc can\'t go on: %s' % _why(error))

    def _trouble(self, why: str) -> None:
        """An end for a while."""
        self._record.troubles += 1
        with contextlib.suppress(OSError):     # which may be what the trouble is
            self._record.save()
        self.end = self.end or End(delay=delay_of(self._record.troubles), message=why)

    # What was seen of the science.

    def _saw(self, seen: Look, now: float) -> None:
        self._not_before = now + LOOK_EVERY
        if seen.state == 'away':
            return self._begin_anew('the machine doesn\'t run', now)
        if seen.state == 'lost':
            return self._begin_attempt(now)
        self._has_looked = True
        self._wait_for_turn(seen.state)
        self._record.cpu = max(self._record.cpu, self._record.before + seen.cpu)
        if not seen.ended or seen.state in ('exited', 'signaled'):     # else it is begun again, perhaps
            self._fraction = max(self._fraction, self._fraction_of(seen))
        self.messages += seen.messages
        if seen.done:
            self._over(End(seen.done.number, True, message=seen.done.message, notice=seen.done.notice), now)
        elif seen.ended:
            self._over(end_of(seen), now)
        elif self._has_run_long_enough():
            self._over(End(0, True), now)
        elif seen.pause:
            self._rest(seen.pause, now)
        elif self._is_checkpoint_due(now) and self._job.checkpoint == 'state':
            self._todo.insert(0, 'checkpoint')
            self._not_before = now
        elif self._is_checkpoint_due(now):
            self._checkpoint(now)

    def _wait_for_turn(self, state: str) -> None:
        """Takes whether it has begun: behind others, on a machine that runs only so many at once, no time of
        its own passes."""
        if state == 'queued' and not self._is_queued:
            log.info('the program waits for its turn: its machine runs no more commands at once')
        self._is_queued = state in ('queued', 'sent')

    def _fraction_of(self, seen: Look) -> float:
        if self._job.job_duration:
            return min(1.0, self._record.elapsed / self._job.job_duration)
        return seen.fraction or 0.0

    def _has_run_long_enough(self) -> bool:
        return bool(self._job.job_duration) and self._record.elapsed >= self._job.job_duration

    def _over(self, end: End, now: float) -> None:
        """The science has ended: well or not, what it made is brought home."""
        log.info('the task is over: %s', describe(end))
        if end.delay:                  # it couldn't even begin, and this may pass
            self._record.attempt += 1
            self._record.before = self._record.checkpoint
            return self._trouble(end.message)
        self._final = end
        self._todo = list(self.ENDING)
        self._waits_since = self._not_before = now

    def _rest(self, pause: Trigger, now: float) -> None:
        """The science asks for a pause."""
        delay = pause.number if 0 < pause.number <= LONGEST_PAUSE else FIRST_DELAY
        self._final = End(delay=delay, message=pause.message or
                          'the task asks for a pause', notice=pause.notice)
        self.wish, self._asked, self._not_before = 'quit', now, now

    def _begin_attempt(self, now: float) -> None:
        """What ran is lost: the science begins anew, with what it has on its disk."""
        self._record.attempt += 1
        self._record.before = self._record.checkpoint
        self._record.put = self._record.collected = False
        self._record.save()
        self._begin_anew('the program was lost with its machine; it begins again', now)

    # Checkpoints and time.

    def _is_checkpoint_due(self, now: float) -> bool:
        every = max(self._period, self._job.minimum_checkpoint_interval)
        return self._job.checkpoint != 'none' and now - self._checkpointed >= every

    def _checkpoint(self, now: float) -> None:
        """What was computed so far stays, whatever happens to this process."""
        self._checkpointed = now
        before = self._record.checkpoint, self._record.fraction
        self._record.checkpoint, self._record.fraction = self._record.cpu, self._fraction
        if not self._save():
            self._record.checkpoint, self._record.fraction = before

    def _save(self) -> bool:
        """Keeps the record, where that is possible: the disk may be full, and what goes on goes on. Says once
        why not."""
        try:
            self._record.save()
            self._complained = False
        except OSError as error:
            if not self._complained:
                log.warning('no checkpoint is recorded: %s', agent.sentence(error))
            self._complained = True
        return not self._complained

    def _count_time(self, now: float) -> None:
        if self._todo[0] in self.AT_WORK and self.wish == 'run' and not (self._is_paused or self._is_queued):
            self._record.elapsed += now - self._last
            self._ran += now - self._last
            if self._ran > GOOD_RUN and (self._record.troubles or self._lost):
                self._record.troubles = self._lost = 0
        self._last = now

    # What the client is told.

    def is_told(self) -> bool:
        """Whether the client wants to hear how far it is, and that is known: a run before this one may have
        told more than it kept, which is of the last checkpoint."""
        return self.wish != 'suspend' and (self._has_looked or not self._record.fraction)

    def status(self, start: float = 0.0, end: float = 1.0) -> str:
        """How far it is, for the client.

        start, end    the part of the task's progress that is this program's
        """
        fraction = start + max(self._fraction, LEAST_FRACTION) * (end - start)
        if self.end is not None and self.end.finish:
            fraction = end
        elif not self._fraction and self._ran > SILENT_FOR:
            fraction = NO_FRACTION
        return ('<current_cpu_time>%e</current_cpu_time>\n<checkpoint_cpu_time>%e</checkpoint_cpu_time>\n'
                '<fraction_done>%e</fraction_done>\n' % (self._record.cpu, self._record.checkpoint, fraction))


def _why(error: Exception) -> str:
    """What the system says; or what of this program broke."""
    return agent.sentence(error) if isinstance(error, OSError) else '%s: %s' % (type(error).__name__, error)


def delay_of(troubles: int) -> float:
    """Seconds of the temporary exit that comes after so many in a row."""
    return float(min(FIRST_DELAY * 2 ** min(troubles - 1, 10), LONGEST_DELAY))


def end_of(seen: Look) -> End:
    """What the end of the science makes of the task."""
    if seen.state == 'exited':
        return End(seen.code, True)
    if seen.state == 'signaled':
        return End(SIGNALLED, True, signal=seen.code,
                   message='the program was ended by signal %d' % seen.code)
    if seen.state == 'failed' and seen.why.startswith(NO_PROGRAM):
        return End(INIT_FAILURE, True, message='the program can\'t be started: %s' % seen.why)
    return End(delay=FIRST_DELAY, message='the program didn\'t run: %s' % (seen.why or seen.state))


def describe(end: End) -> str:
    """An end, for the log."""
    if end.message:
        return end.message
    return 'exit code %d' % end.code
