"""The part of Ray's jobs API that a client of it needs, on the loopback; runs the jobs for real."""

import asyncio
import os
import subprocess
import threading
from pathlib import Path

from aiohttp import web


class JobServer:
    """Use as a context manager; `address` is that of a dashboard."""

    def __init__(self, folder: Path, ray_version: str) -> None:
        """`folder` gets the logs and is the first on the path of the jobs."""
        self._folder, self._version = folder, ray_version
        self._jobs = {}

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=[ready])
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for process in self._jobs.values():
            process.kill()
            process.wait()

    def _serve(self, ready):
        app = web.Application()
        app.router.add_get("/api/version", self._tell_version)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{job}", self._info)
        app.router.add_get("/api/jobs/{job}/logs/tail", self._tail)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    def _details(self, job):
        code = self._jobs[job].poll()
        status = "RUNNING" if code is None else "FAILED" if code else "SUCCEEDED"
        return {
            "type": "SUBMISSION", "submission_id": job, "status": status, "entrypoint": "",
            "message": f"exit code {code}", "driver_exit_code": code,
        }  # fmt: skip

    async def _tell_version(self, _):
        answer = {"version": "4", "ray_version": self._version, "ray_commit": ""}
        return web.json_response(answer)

    async def _list(self, _):
        return web.json_response([self._details(job) for job in self._jobs])

    async def _info(self, request):
        return web.json_response(self._details(request.match_info["job"]))

    async def _submit(self, request):
        body = await request.json()
        job = body["submission_id"]
        if job in self._jobs:
            return web.Response(status=500, text=f"{job} is there already")
        path = f"{self._folder}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **body["runtime_env"]["env_vars"], "PATH": path}
        with open(self._folder / f"{job}.log", "wb") as log:
            self._jobs[job] = subprocess.Popen(
                body["entrypoint"], shell=True, stdout=log, stderr=log, env=environment
            )
        return web.json_response({"job_id": job, "submission_id": job})

    async def _tail(self, request):
        job = request.match_info["job"]
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        with open(self._folder / f"{job}.log") as log:
            while True:
                ended = self._jobs[job].poll() is not None
                if text := log.read():
                    await socket.send_str(text)
                if ended:
                    break
                await asyncio.sleep(0.05)
        await socket.close()
        return socket
