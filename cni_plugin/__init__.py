"""The CNI executable: environment and standard input → one call to the node's daemon → standard output.

A runtime starts a process for every ADD, DEL and CHECK, so starting is most of the cost. Nothing is imported from
outside the standard library, and on the way that succeeds nothing but what is compiled into the interpreter: `json`,
`re` or `socket` would cost 5 ms each, the whole call costs less than two of them.

    main          the order of things, the deadlines, what is printed
    environment   the runtime's variables, checked                       no daemon needed
    protocol      proto/podwire/v1/cni.proto by hand                     pure
    h2            one unary gRPC call as bytes in and bytes out          pure
    transport     the same over a unix socket, with one deadline
    queue         where a DEL waits for a daemon that is down
    failure       CNI errors as text; imported when there is one

The modules run on Python 3.9 or newer, whichever the node has; they do without `__future__`, `typing` and
`dataclasses`, which are imports too.
"""
