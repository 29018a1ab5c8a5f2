"""The worker: it opens sealed requests and answers them with its models.

A thread of llama.cpp that waits for the others spins first, then sleeps. By default GNU OpenMP spins for some milliseconds. On
a busy machine the spinning thread then keeps a core that the others need. With two threads on two cores and a load of 8 to 12,
a step took 1 to 5 s in place of 20 ms. With 1000 turns it took 20 to 140 ms there, and on an idle machine as long as before.
The library reads the variable when it is loaded, so it is set before anything here imports llama.cpp.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
