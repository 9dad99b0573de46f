"""Has allocations fail: of whoever loads the module, of its thread, also when all is withdrawn and reported again, of whoever
sets a knob.

failures.py load MODULE | thread | withdraw | knobs: prints how many allocations failed.
"""

import collections
import ctypes
import errno
import glob
import mmap
import os
import sys
import time

DEBUG = "/sys/kernel/debug"
SYSFS = "/sys/kernel/pagefusion"
FINIT_MODULE, DELETE_MODULE = 313, 176
LIBC = ctypes.CDLL(None, use_errno=True)


def put(path, value):
    with open(path, "w") as file:
        file.write(value)


def number(name):
    with open("%s/%s" % (SYSFS, name)) as file:
        return int(file.read())


def prepare():
    """All of a task's allocations count, those that may wait as well; nothing is said of those that fail."""
    for name in ["failslab", "fail_page_alloc"]:
        put("%s/%s/ignore-gfp-wait" % (DEBUG, name), "N")
        put("%s/%s/verbose" % (DEBUG, name), "0")
    put(DEBUG + "/fail_page_alloc/ignore-gfp-highmem", "N")
    put(DEBUG + "/fail_page_alloc/min-order", "0")


def syscall(*arguments):
    if LIBC.syscall(*arguments) == 0:
        return 0
    return ctypes.get_errno()


def unload():
    error = syscall(DELETE_MODULE, b"pagefusion", os.O_NONBLOCK)
    if error:
        sys.exit("the module cannot be unloaded: %s" % os.strerror(error))


def failing(nth, act):
    """Has the nth allocation of this thread in `act` fail. What it returned, and whether there was such a one."""
    mine = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
    try:
        os.pwrite(mine, b"%d\0" % nth, 0)
        result = act()
        left = int(os.pread(mine, 32, 0).split(b"\0")[0])
        os.pwrite(mine, b"0\0", 0)
        return result, left == 0
    finally:
        os.close(mine)


def load(module):
    """Loads with the first, second, third … allocation failing, until there are no more."""
    ended = collections.Counter()
    nth = 0
    # Now and then something else takes one from the count; the end is when a row of tries has met none.
    met_none = 0
    while met_none < 3:
        nth += 1
        file = os.open(module, os.O_RDONLY)
        error, failed = failing(nth, lambda: syscall(FINIT_MODULE, file, b"", 0))
        os.close(file)
        met_none = 0 if failed else met_none + 1
        ended[errno.errorcode.get(error, "loaded")] += 1
        # The second is what drivers/base/module.c says when it gets no memory for the driver's links.
        if error not in (0, errno.ENOMEM, errno.EINVAL):
            sys.exit("loading ended with %s when allocation %d failed" % (os.strerror(error), nth))
        if error == 0:
            unload()
    print("%d allocations: %s" % (nth - met_none, dict(ended)))


def thread_of_module():
    for path in glob.glob("/proc/[0-9]*/comm"):
        try:
            with open(path) as file:
                if file.read().strip().startswith("pagefusion"):
                    return os.path.dirname(path)
        except OSError:
            pass
    sys.exit("the module has no thread")


def thread():
    """The same of the module's thread, which gets files to look at that it has never seen."""
    path = thread_of_module() + "/fail-nth"
    for name in ["sleep_millisecs", "max_sleep_millisecs"]:
        put("%s/%s" % (SYSFS, name), "10")
    views = collections.deque(maxlen=4)
    met_none, nth = 0, 0
    while met_none < 5:
        nth += 1
        name = "/var/tmp/failures-%d" % nth
        with open(name, "w+b") as file:
            file.write(os.urandom(1 << 20))
            file.flush()
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        os.unlink(name)
        put(path, str(nth))
        for at in range(0, len(view), 4096):
            view[at]
        views.append(view)
        # The one under way, and one that sees the file.
        passes(2, nth)
        met_none = met_none + 1 if left_of(path) else 0
    print("%d allocations" % (nth - met_none))


def passes(more, nth):
    passes = number("full_scans") + more
    until(lambda: number("full_scans") >= passes, "no pass ends when allocation %d fails" % nth)


def until(come, otherwise):
    deadline = time.monotonic() + 120
    while not come():
        if time.monotonic() > deadline:
            sys.exit(otherwise)
        time.sleep(0.02)


def left_of(path):
    """How many allocations were left until one would have failed; none fails from now on."""
    with open(path) as file:
        left = int(file.read().rstrip("\0\n"))
    put(path, "0")
    return left


def withdraw():
    """The same of the module's thread, which withdraws everything and reports it again. Of many allocations that are alike,
    not each."""
    path = thread_of_module() + "/fail-nth"
    met_none, nth, tries = 0, 0, 0
    while met_none < 3:
        nth += 1 + nth // 8
        tries += 1
        put(path, str(nth))
        put(SYSFS + "/run", "2")
        until(lambda: number("pages_tracked") == 0, "not all is withdrawn when allocation %d fails" % nth)
        put(SYSFS + "/run", "1")
        passes(2, nth)
        met_none = met_none + 1 if left_of(path) else 0
    print("%d of %d allocations" % (tries - met_none, nth))


def knobs():
    """The same of whoever sets a list, which needs memory for it."""
    counted = 0
    for text in [b"*.pem *secret*", b"+*.key", b"-*.pem", b"\n"]:
        met_none, nth = 0, 0
        while met_none < 2:
            nth += 1
            file = os.open(SYSFS + "/exclude", os.O_WRONLY)

            def act():
                try:
                    return os.write(file, text)
                except OSError as error:
                    return -error.errno

            result, failed = failing(nth, act)
            os.close(file)
            # What an earlier try has taken from the list cannot be taken from it again.
            gone = text.startswith(b"-") and result == -errno.EINVAL
            if result not in (len(text), -errno.ENOMEM) and not gone:
                sys.exit("%r was answered with %d when allocation %d failed" % (text, result, nth))
            met_none = 0 if failed else met_none + 1
            counted += failed
    put(SYSFS + "/exclude", "\n")
    print("%d allocations" % counted)


prepare()
if sys.argv[1] == "load":
    load(sys.argv[2])
elif sys.argv[1] == "thread":
    thread()
elif sys.argv[1] == "withdraw":
    withdraw()
else:
    knobs()
