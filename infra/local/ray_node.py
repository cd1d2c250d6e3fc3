"""``ray`` for nodes that listen on the loopback address alone: ``python infra/local/ray_node.py start ...``.

Ray binds the ports of a node whose address is 127.0.0.1 to the loopback, the one for metrics included, which asks for
no token. But on Linux its command line replaces such an address by the machine's own. That is changed here for the
command, and by a variable for the processes that it starts.

It also refuses a head as long as this machine has nodes of that address: after the death of the head, those of the last
cluster, which look for it for a minute. Two heads are kept apart by their port.
"""

import os

VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
os.environ.pop(VARIABLE, None)  # with it, the command refuses a second node

from ray._private import services  # noqa: E402
from ray.scripts.scripts import main  # noqa: E402

services.get_node_ip_address = lambda address=None: "127.0.0.1"
services.find_bootstrap_address = lambda temp_dir: None
os.environ[VARIABLE] = "0"

if __name__ == "__main__":
    main()
