"""A small service with a good part of the standard library loaded, as real ones have."""

import asyncio
import concurrent.futures
import ctypes
import decimal
import email.message
import hashlib
import http.server
import json
import logging
import lzma
import multiprocessing
import os
import socket
import sqlite3
import ssl
import subprocess
import tarfile
import unittest
import urllib.request
import uuid
import xml.etree.ElementTree
import zipfile

LOADED = [
    asyncio, concurrent.futures, ctypes, decimal, email.message, hashlib, lzma, logging,
    multiprocessing, subprocess, tarfile, unittest, urllib.request, uuid,
    xml.etree.ElementTree, zipfile,
]


class Status(http.server.BaseHTTPRequestHandler):
    """Answers every request with what this process runs on."""

    def do_GET(self):
        with sqlite3.connect(":memory:") as database:
            (answer,) = database.execute("select 6 * 7").fetchone()
        body = json.dumps(
            {"answer": answer, "ssl": ssl.OPENSSL_VERSION, "modules": len(LOADED)}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Status)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
    ready.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
server.serve_forever()
