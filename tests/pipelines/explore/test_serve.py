"""The explorer's server."""

import asyncio
import socket

from ovref_pipelines.explore.serve import listening


def test_answers_do_not_wait_for_acknowledgements():
    async def accepted():
        found = asyncio.get_running_loop().create_future()

        async def serve(_reader, writer):
            one = writer.get_extra_info("socket")
            found.set_result(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listening("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(serve, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                option = await found
                writer.close()
                await writer.wait_closed()
        return option

    assert asyncio.run(accepted()) == 1
