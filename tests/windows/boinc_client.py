"""A BOINC client for one task, on Windows: that Python runs it in the slot, with the words NAME and PROGRAM.

It makes the shared memory NAME, as a client does, and starts PROGRAM with this Python. What the task tells it
prints, a line each; words that come as lines of standard input it tells the task.
"""

import mmap
import os
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from boincslot import CHANNEL, CHANNELS, CONTROL, STATUS, Channels


def pass_words_on(channels):
    for line in sys.stdin:
        while not channels.send(CONTROL, '<%s/>' % line.strip()):
            time.sleep(0.05)


def main(name, program):
    channels = Channels(mmap.mmap(-1, CHANNELS * CHANNEL, tagname=name))
    with open('init_data.xml', 'r+') as file:
        text = file.read().replace('<client_pid>0<', '<client_pid>%d<' % os.getpid())
        file.seek(0)
        file.write(text)
    threading.Thread(target=pass_words_on, args=(channels,), daemon=True).start()
    with open('stderr.txt', 'ab') as errors:
        task = subprocess.Popen([sys.executable, program], stdin=subprocess.DEVNULL, stderr=errors)
    while task.poll() is None:
        text = channels.receive(STATUS)
        if text:
            print(' '.join(text.split()), flush=True)
        time.sleep(0.05)
    print('ended with %d' % task.returncode, flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
