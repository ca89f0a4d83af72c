"""The program at its broker's door, for tests: what came out, in its order."""

import threading

from helpers import wait_until
from stomp_client import Frame

from stompdoor import Door

MARKS = '/topic/marks'


class Program:
    """``close`` it, or use it in a ``with`` block; made before its broker is started."""

    def __init__(self, broker, *topics):
        self._broker = broker
        self._came = []
        self._may_take = threading.Event()
        self._may_take.set()
        self._thread = threading.Thread(target=self._take, name='program', daemon=True)
        self.door = Door(broker, topics + (MARKS,))
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.read()
        self.door.close()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _take(self):
        for frames in iter(self.door.wait, None):
            self._came += frames
            self._may_take.wait()
            self.door.taken()

    def pause(self):
        """Takes no more, until it reads again."""
        self._may_take.clear()

    def read(self):
        """Goes on."""
        self._may_take.set()

    def say(self, destination, body=b'', **headers):
        """A message, which its receivers have when this returns."""
        assert self.door.send(destination, headers, body)
        self._settle()

    def _settle(self):
        done = threading.Event()
        self._broker.do(done.set)
        assert done.wait(30)

    def before_now(self):
        """What came out since the last call, as stomp_client shows frames."""
        return [Frame(one.command, ['%s:%s' % item for item in one.headers.items()], one.body)
                for one in self.door_frames()]

    def door_frames(self):
        """The same as they are."""
        self._settle()
        wait_until(lambda: not self._broker.counters()['waiting_bytes'], 30)
        self.door.send(MARKS, {}, b'')         # in a lane of its own, before which nothing waits
        wait_until(lambda: self._came and self._came[-1].headers['destination'] == MARKS, 30)
        came, self._came = self._came[:-1], []
        return came
