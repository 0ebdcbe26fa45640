"""A worker that says who it is and does what it is told, one command a connection after any
number of `stay`.

    python -m tests.obedient_worker COMMAND ASSIGNMENT

COMMAND is done at the start: `serve`, one of those that end it, or who does when.
"""

import asyncio
import json
import os
import signal
import sys
import time

from app.config import Settings
from app.listener import bind, one_each
from app.supervisor import Assignment
from app.worker import Parent


def stand_still() -> None:
    time.sleep(3600)


async def serve(parent: Parent) -> None:
    """Until SIGTERM."""
    port, workers = int(os.environ["PORT"]), int(os.environ["WORKERS"])
    listeners = [parent.listener] if parent.listener else one_each(bind("127.0.0.1", port), workers)
    listener = listeners[0]
    stuck_s, drain_s = float(os.environ["STUCK_S"]), float(os.environ["DRAIN_S"])
    parent.tell(Settings(workers=workers, stuck_s=stuck_s, drain_s=drain_s), listeners)
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told_to_stop.set)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (command := await told(reader, writer)) == "stay":
            pass
        match command:
            case "orphan":
                await asyncio.create_subprocess_shell("sleep 0.1 &")
            case "defy":
                loop.add_signal_handler(signal.SIGTERM, server.close)
            case _:
                obey(command)
        writer.close()

    async def told(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        command = (await reader.readline()).decode().strip()
        if command:
            answer = json.dumps([os.getpid(), parent.replaced]).encode() + b"\n"
            writer.write(answer)  # sent at once
        return command

    server = await asyncio.start_server(answer, sock=listener)
    async with server, parent.beating(lambda lag_s: None):
        await told_to_stop.wait()


def obey(command: str) -> None:
    """`serve`, `who` and the end of a connection are nothing to do."""
    match command:
        case "block":
            stand_still()
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "ends":
            print("there is no model", file=sys.stderr)
            sys.exit(3)


if __name__ == "__main__":
    at_start, argument = sys.argv[1:]
    assignment = Assignment.from_json(argument)
    match at_start:
        case "second ends":
            obey("ends" if assignment.place == 1 else "serve")
        case "second blocks":
            obey("block" if assignment.place == 1 else "serve")
        case "second ends once replaced":
            obey("ends" if assignment.place == 1 and assignment.replaced["died"] else "serve")
        case _:
            obey(at_start)
    asyncio.run(serve(Parent(assignment)))
