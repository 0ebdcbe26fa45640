"""The floor of ASGI: uvicorn, set as Hikyaku sets it, in front of an application that does nothing.

    python echo.py PORT

It reads the body and answers JSON of the size of a prediction's answer.
"""

import sys
from typing import Any

import uvicorn

ANSWER = b'{"echo":"%s"}' % (b"." * 200)
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})


uvicorn.run(
    echo,
    port=int(sys.argv[1]),
    loop="uvloop",
    http="httptools",
    ws="none",
    lifespan="off",
    log_config=None,
    access_log=False,
    server_header=False,
    proxy_headers=False,
)
