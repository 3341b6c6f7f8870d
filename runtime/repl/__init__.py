"""What `bin/attach` asks of a running system: to look into it, to call its actors, to evaluate inside of them.

    console (a process of its own)          root process                           node process
    frames.py  --socket, 0600, token-->     door.py  its own thread and loop
    snippets.py: the user's code runs            |
    there, and asks for            -->      desk.py  --call, stream----------->    any actor
                                                 |-----evaluate, trace, pause->    inside.py, in the agent
                                                 '-----peek, names, interrupt->    look.py, in the inspector's thread

What a user types at the prompt runs in the console: it can do no harm but by what it asks for. What he types after
`enter` runs inside an actor, as one message of it (inside.py), and can be interrupted (interrupt.py). Looking never
waits for a loop: it is done by threads. live.py keeps the settings that may be changed while a run goes on.
"""
