"""compiler.py SOURCE: a compiler in use, as one that somebody works with.

It has compiled and linked a program, which ran, and waits for the rest of another one.
"""

import glob
import os
import subprocess
import sys
import time

WORK = "/var/tmp/compiler"
PRINTS = "6 the 5 99.50 322.143"
LIMIT = 120

os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*command):
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit("%s: %s" % (" ".join(command), done.stderr.strip()))
    return done.stdout.strip()


def running():
    found = set()
    for link in glob.glob("/proc/[0-9]*/exe"):
        try:
            found.add(os.path.basename(os.readlink(link)))
        except OSError:
            pass  # It has ended meanwhile.
    return found


os.makedirs(WORK)
with open(WORK + "/program.c", "w") as file:
    file.write(sys.argv[1])
run("gcc", "-O2", "-Wall", "-o", WORK + "/program", WORK + "/program.c", "-lm")
if (printed := run(WORK + "/program")) != PRINTS:
    sys.exit("the program prints %r" % printed)

subprocess.Popen(["sh", "-c", "sleep infinity | exec gcc -pipe -O2 -x c -c -o /dev/null -"], start_new_session=True,
                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
end = time.monotonic() + LIMIT
while not {"cc1", "x86_64-linux-gnu-as"} <= running():
    if time.monotonic() > end:
        sys.exit("no compiler is running: %s" % sorted(running()))
    time.sleep(0.1)  # No event says what a process runs.
