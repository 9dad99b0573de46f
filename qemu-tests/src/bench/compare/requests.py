"""requests.py RATE FILE: asks a guest's own web server RATE times a second until FILE.stop is there.

FILE has a line for each answer: when the request was due, in seconds since the boot, and how many microseconds later
the answer had come. A request that waits for another before it is late as well.
"""

import http.client
import os
import sys
import time


def uptime():
    return time.clock_gettime(time.CLOCK_BOOTTIME)


rate, path = float(sys.argv[1]), sys.argv[2]
connection = http.client.HTTPConnection("127.0.0.1", 80, timeout=60)
start = uptime()
with open(path, "w", buffering=1) as log:
    number = 0
    while not os.path.exists(path + ".stop"):
        due = start + number / rate
        number += 1
        time.sleep(max(0, due - uptime()))
        connection.request("GET", "/")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            sys.exit(f"the web server answered {answer.status}")
        log.write(f"{due} {(uptime() - due) * 1e6}\n")
