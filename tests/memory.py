"""How much memory a program that a test starts has needed."""


def peak():
    """Return the most memory that this process has held, in MiB.

    ``ru_maxrss`` would not do: in a new process it begins at what the one
    that started it held, and a whole run of the tests holds much.
    """
    with open('/proc/self/status') as file:
        (line,) = (line for line in file if line.startswith('VmHWM:'))
    return int(line.split()[1]) / 1024
