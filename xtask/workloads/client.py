"""Consecutive INCRs on one connection, every reply checked. Reports what it has seen."""
import json
import os
import socket
import sys
import time

host, report, stop = sys.argv[1:]
# The replica comes by IPv6, this client by IPv4.
server = socket.create_connection(socket.getaddrinfo(host, 6379, socket.AF_INET)[0][4])
server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
replies = server.makefile("rb")
state = {"count": 0, "error": None, "done": False, "longest_ms": [], "pid": os.getpid()}


def tell():
    with open(report + ".new", "w") as file:
        json.dump(state, file)
    os.rename(report + ".new", report)


request = b"*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n"
told = time.monotonic()
try:
    while not (state["count"] % 64 == 0 and os.path.exists(stop)):
        begin = time.monotonic()
        server.sendall(request)
        reply = replies.readline()
        now = time.monotonic()
        expected = b":%d\r\n" % (state["count"] + 1)
        if reply != expected:
            raise ValueError(f"reply {reply!r} instead of {expected!r}")
        state["count"] += 1
        # The place in the stream and the wait, of whatever is not a matter of course.
        if now - begin > 0.003:
            state["longest_ms"].append([state["count"], round((now - begin) * 1000, 1)])
        if now - told > 0.05:
            told = now
            tell()
    state["done"] = True
except Exception as error:
    state["error"] = f"after {state['count']} replies: {error}"
tell()
