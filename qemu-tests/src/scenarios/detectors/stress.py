"""Everything at once that changes what a module that walks processes and page caches looks at.

stress.py SEED PAUSE: until the file STOP is there, with pauses of up to so many seconds between two changes of a kind.
Then says how often each kind of change has come about, a line for each. Exits with 1, and says why, when bytes are not
what was written.
"""

import errno
import glob
import mmap
import os
import random
import signal
import subprocess
import sys
import time

STOP = "/tmp/stress-stop"
PAGE = 4096
LIBRARIES = [path for path in glob.glob("/usr/lib/x86_64-linux-gnu/*.so*") if os.path.isfile(path)]


PAUSE = float(sys.argv[2])
KINDS = ["map", "fork", "file", "drop caches", "compact memory", "CPU off", "CPU on",
         "memory off", "memory on"]
# What every worker has done: a row for each, in memory that all have.
WORKERS = 6
DONE = mmap.mmap(-1, WORKERS * len(KINDS) * 8)
worker = 0


def did(kind):
    at = 8 * (worker * len(KINDS) + KINDS.index(kind))
    DONE[at:at + 8] = (int.from_bytes(DONE[at:at + 8], "little") + 1).to_bytes(8, "little")


def times(kind):
    rows = range(KINDS.index(kind) * 8, len(DONE), len(KINDS) * 8)
    return sum(int.from_bytes(DONE[at:at + 8], "little") for at in rows)


def going_on(rng):
    time.sleep(rng.random() * PAUSE)
    return not os.path.exists(STOP)


def content(tag, pages):
    """Bytes that say which page of which file they are."""
    return b"".join((b"%s page %d. " % (tag, page)).ljust(64) * (PAGE // 64) for page in range(pages))


def maps(rng):
    """Libraries come and go in an address space."""
    held = []
    while going_on(rng):
        with open(rng.choice(LIBRARIES), "rb") as file:
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
        for at in range(0, len(view), PAGE * 3):
            view[at]
        held.append(view)
        did("map")
        if len(held) > 8:
            held.pop(rng.randrange(len(held))).close()


def forks(rng):
    """Processes of all ages."""
    while going_on(rng):
        children = []
        for _ in range(rng.randrange(1, 6)):
            child = os.fork()
            if child == 0:
                time.sleep(rng.random() / 20)
                os._exit(0)
            children.append(child)
        subprocess.run(["/bin/true"], check=True)
        for child in children:
            os.waitpid(child, 0)
        did("fork")


def files(rng):
    """A file is written, mapped, rewritten, truncated and replaced, and its bytes are looked at."""
    directory = "/var/tmp/stress-%d" % os.getpid()
    os.makedirs(directory, exist_ok=True)
    path, spare = directory + "/file", directory + "/spare"
    round = 0
    while going_on(rng):
        round += 1
        pages = rng.randrange(1, 96)
        expected = bytearray(content(b"%d/%d" % (os.getpid(), round), pages))
        with open(spare, "wb") as file:
            file.write(expected)
            if rng.random() < 0.3:
                os.fsync(file.fileno())
        os.rename(spare, path)
        with open(path, "r+b") as file:
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
            check(view[:], expected, "a mapping")
            time.sleep(rng.random() / 10)
            for _ in range(rng.randrange(4)):
                page = rng.randrange(pages)
                data = content(b"%d/%d again" % (os.getpid(), round), 1)
                os.pwrite(file.fileno(), data, page * PAGE)
                expected[page * PAGE:(page + 1) * PAGE] = data
            check(view[:], expected, "a mapping of rewritten bytes")
            view.close()
            left = rng.randrange(len(expected))
            os.truncate(path, left)
            del expected[left:]
            file.seek(0)
            check(file.read(), expected, "a truncated file")
            did("file")
        if rng.random() < 0.2:
            os.unlink(path)


def check(found, expected, what):
    if found == expected:
        return
    at = next(at for at in range(min(len(found), len(expected)) + 1)
              if found[at:at + 1] != expected[at:at + 1])
    print("%s is wrong at byte %d of %d: %r, not %r" % (
        what, at, len(expected), bytes(found[at:at + 32]), bytes(expected[at:at + 32])), flush=True)
    os._exit(1)


def memory(rng):
    """Caches are dropped and memory is compacted."""
    while going_on(rng):
        if rng.random() < 0.3:
            # What shrinks everything makes the module rest for ten seconds, so it is rare.
            set_("/proc/sys/vm/drop_caches", "3" if rng.random() < 0.02 else "1", "drop caches")
        set_("/proc/sys/vm/compact_memory", "1", "compact memory")
        bytearray(rng.randrange(1, 48) << 20)
        time.sleep(rng.random() / 2)


def plugs(rng):
    """A CPU and pieces of memory are taken away and come back."""
    blocks = glob.glob("/sys/devices/system/memory/memory[0-9]*")
    movable = [block for block in blocks if "Movable" in zones(block)]
    others = [block for block in blocks if block not in movable]
    while going_on(rng):
        set_("/sys/devices/system/cpu/cpu1/online", "0", "CPU off")
        time.sleep(rng.random() / 2)
        set_("/sys/devices/system/cpu/cpu1/online", "1", "CPU on")
        # Other blocks hold memory that cannot be moved, and the kernel tries for ever.
        block, patience = (rng.choice(others), "1") if rng.random() < 0.5 else (rng.choice(movable), "60")
        offline = ["timeout", patience, "sh", "-c", 'echo offline > "$0"', block + "/state"]
        if subprocess.run(offline, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            did("memory off")
        time.sleep(rng.random() / 2)
        set_(block + "/state", "online_movable", "memory on")


def zones(block):
    with open(block + "/valid_zones") as file:
        return file.read()


def set_(path, value, kind):
    try:
        with open(path, "w") as file:
            file.write(value)
        did(kind)
    except OSError as error:
        # Somebody is in the way, or it is like that already.
        if error.errno not in (errno.EBUSY, errno.EAGAIN, errno.ENOMEM, errno.EINVAL):
            raise


def main():
    global worker
    rng = random.Random(int(sys.argv[1]))
    workers = []
    for number, work in enumerate([maps, forks, files, files, memory, plugs]):
        child = os.fork()
        if child == 0:
            status, worker = 1, number
            try:
                work(random.Random(rng.random() + number))
                status = 0
            finally:
                os._exit(status)
        workers.append((child, work))
    failed = False
    while workers:
        child, status = os.wait()
        work = dict(workers)[child]
        workers = [(other, of) for other, of in workers if other != child]
        if status != 0:
            print("%s ended with %d" % (work.__name__, status), flush=True)
            failed = True
            open(STOP, "w").close()
    for kind in KINDS:
        print("%d times: %s" % (times(kind), kind))
    sys.exit(failed)


# Whoever started us may be gone.
signal.signal(signal.SIGHUP, signal.SIG_IGN)
main()
