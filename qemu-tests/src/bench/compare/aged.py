"""aged.py SECONDS SEED: hours of a machine's life in minutes, which leave its memory in pieces.

Files are packed, compiled, read and deleted, a database is filled and asked, processes take nearly all memory and end
in any order, and services are started again, so that their files are read into what is free then.
"""

import glob
import os
import random
import shutil
import subprocess
import sys
import time

WORK = "/var/tmp/aged"
SERVICES = ["nginx", "postgresql@*", "pagefusion-python"]
LIBRARY = glob.glob("/usr/lib/python3.*")[0]
# What is left free of memory, or the kernel would end somebody.
SPARE = 96 << 20

os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*command, **options):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)


def available():
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) << 10


def packs(rng):
    kept = sorted(glob.glob(WORK + "/*.tgz"), key=os.path.getmtime)
    for path in kept[:-6]:
        os.unlink(path)
    source = rng.choice([path for path in glob.glob("/usr/share/*") + glob.glob("/etc/*") if os.path.isdir(path)])
    run("tar", "-C", source, "-I", "gzip -1", "-cf", "%s/%d.tgz" % (WORK, rng.randrange(1 << 30)), ".")


def compiles(rng):
    packages = [path for path in glob.glob(LIBRARY + "/*") if os.path.isdir(path)]
    cache = WORK + "/cache"
    shutil.rmtree(cache, ignore_errors=True)
    run(sys.executable, "-m", "compileall", "-q", "-f", rng.choice(packages), env={"PYTHONPYCACHEPREFIX": cache})
    run("gcc", "-O2", "-o", WORK + "/program", "/var/tmp/compiler/program.c", "-lm")


def reads(rng):
    paths = [path for path in glob.glob("/usr/lib/x86_64-linux-gnu/*") + glob.glob("/usr/bin/*")
             if os.path.isfile(path)]
    for path in rng.sample(paths, 60):
        with open(path, "rb") as file:
            while file.read(1 << 16):
                pass


def asks(rng):
    tool = glob.glob("/usr/lib/postgresql/*/bin/pgbench")[0]
    user = ["runuser", "-u", "postgres", "--", tool]
    run(*user, "-i", "-q", "-s", str(rng.randrange(1, 3)), "postgres", cwd="/tmp")
    run(*user, "-T", "2", "postgres", cwd="/tmp")


def takes_memory(rng):
    """Processes that hold memory in pieces of all sizes, no two pages alike."""
    code = ("import os, random, sys; rng = random.Random(sys.argv[1]); left = int(sys.argv[2]); held = []\n"
            "page = bytearray(os.urandom(4096))\n"
            "while left > 0:\n"
            "    piece = bytearray()\n"
            "    for number in range(min(rng.randrange(1, 512), left + 4095 >> 12)):\n"
            "        page[:8] = (left - number).to_bytes(8, 'little'); piece += page\n"
            "    held.append(piece); left -= len(piece)\n"
            "print(flush=True); sys.stdin.read()")
    children = []
    while (left := available() - SPARE) > 16 << 20:
        size = min(left, rng.randrange(16, 128) << 20)
        child = subprocess.Popen([sys.executable, "-c", code, str(rng.random()), str(size)],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        children.append(child)
    rng.shuffle(children)
    for child in children:
        child.stdin.close()
        child.wait()


def starts_again(rng):
    service = rng.choice(SERVICES)
    subprocess.run(["systemctl", "reset-failed", service], check=False)
    run("systemctl", "restart", service)


def main():
    end = time.monotonic() + float(sys.argv[1])
    rng = random.Random(int(sys.argv[2]))
    os.makedirs(WORK, exist_ok=True)
    rounds = 0
    while time.monotonic() < end:
        for work in rng.sample([packs, compiles, reads, asks, takes_memory, starts_again], 6):
            work(rng)
        rounds += 1
    for service in SERVICES:
        subprocess.run(["systemctl", "reset-failed", service], check=False)
        run("systemctl", "restart", service)
    shutil.rmtree(WORK)
    os.sync()
    print(rounds)


main()
