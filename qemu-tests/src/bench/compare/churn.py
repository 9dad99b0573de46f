"""churn.py STEP: what changes the files that guests share.

`prepare` packs packages that are installed again, as a later version of the same files; `upgrade` installs those and
starts the services again; `compile` compiles a good part of Python's library, and a program in C as often as it has parts;
`drop` drops what caches can let go of.
"""

import glob
import os
import shutil
import subprocess
import sys

WORK = "/var/tmp/churn"
INFO = "/var/lib/dpkg/info/"
PACKAGES = ["libssl3t64", "zlib1g", "libsystemd0", "perl-base", "nginx", "libpython3.*-stdlib", "python3.*-minimal",
            "libpq5", "postgresql-[0-9]*"]
SERVICES = ["nginx", "postgresql@*", "pagefusion-python"]

os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*command, **options):
    done = subprocess.run(command, text=True, capture_output=True, **options)
    if done.returncode != 0:
        sys.exit("%s: %s" % (" ".join(command), done.stderr.strip()))
    return done.stdout


def pack(listing):
    name = os.path.basename(listing).removesuffix(".list")
    tree = "%s/%s" % (WORK, name)
    os.makedirs(tree + "/DEBIAN")
    with open(listing) as file:
        for path in file.read().split("\n"):
            target = tree + path
            # /lib and such are links to directories of /usr, which packages name as directories.
            if os.path.isfile(path) or os.path.islink(path) and path.count("/") > 1:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copy2(path, target, follow_symlinks=False)
    kept = ("Package", "Architecture", "Maintainer", "Multi-Arch", "Description")
    fields = [line for line in run("dpkg-query", "-s", name).split("\n") if line.split(":")[0] in kept]
    version = run("dpkg-query", "-W", "-f", "${Version}", name)
    with open(tree + "/DEBIAN/control", "w") as file:
        file.write("\n".join(fields + ["Version: %s+again" % version, ""]))
    run("dpkg-deb", "-Znone", "--root-owner-group", "-b", tree, tree + ".deb")
    shutil.rmtree(tree)


def prepare():
    os.makedirs(WORK)
    for package in PACKAGES:
        listings = glob.glob(INFO + package + ".list") + glob.glob(INFO + package + ":*.list")
        if not listings:
            sys.exit("no package %s is installed" % package)
        for listing in listings:
            pack(listing)
    os.sync()


def upgrade():
    run("dpkg", "--force-all", "-i", *sorted(glob.glob(WORK + "/*.deb")))
    for service in SERVICES:
        run("systemctl", "restart", service)


def compile():
    library = glob.glob("/usr/lib/python3.*")[0]
    parts = [library + "/" + name for name in ["asyncio", "email", "json", "logging", "xml", "http", "unittest"]]
    run(sys.executable, "-m", "compileall", "-q", "-f", *parts, env={"PYTHONPYCACHEPREFIX": WORK + "/cache"})
    shutil.rmtree(WORK + "/cache")
    for _ in parts:
        run("gcc", "-O2", "-o", WORK + "/program", "/var/tmp/compiler/program.c", "-lm")


def drop():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


{"prepare": prepare, "upgrade": upgrade, "compile": compile, "drop": drop}[sys.argv[1]]()
