"""Run as a program of its own, with nothing but the standard library: locks itself in, then runs a program inside.

    python -I -S confine.py SETTINGS_FD STATUS_FD

SETTINGS_FD holds JSON (see `sandbox.run_python`). On STATUS_FD comes one line: `setup: why not`, `exit N`, `signal N`.
Three processes: this one; with namespaces, the first of a process namespace, whose end ends all others in it; and the
program. Each dies with the one before it.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, SYS_MOUNT_SETATTR = 2, -100, 0x8000, 442
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc/ld.so.cache",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
)
BOX = "/box"
libc = ctypes.CDLL(None, use_errno=True)


class Setup(Exception):
    """The program cannot be locked in, so it is not run."""


class Stop(Exception):
    """Time is up (SIGTERM): end what runs, and only then this process."""


def call(name: str, *args: Any) -> None:
    """A function of libc by its name; Setup with the reason where it fails."""
    encoded = [
        arg.encode() if isinstance(arg, str) else ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args
    ]
    if getattr(libc, name)(*encoded) == -1:
        raise Setup(f"{name}({', '.join(map(str, args[:2]))}): {os.strerror(ctypes.get_errno())}")


def die_with(parent: int) -> None:
    """Be killed when the parent ends; at once if it has ended already."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def enter_namespaces() -> None:
    """No network, no other processes, no other host name; a user that is nobody outside. Mounts become private."""
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        call("unshare", NAMESPACES)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        return
    # Root stays the owner of what it may read while it builds the box, and becomes nobody in it. A map of two users
    # must be written from outside.
    ready, written = os.pipe(), os.pipe()
    me = os.getpid()
    writer = os.fork()
    if writer == 0:
        os.close(ready[1])  # or it would wait for itself if the other were killed
        try:
            os.read(ready[0], 1)
            for name in ("uid_map", "gid_map"):
                write(f"/proc/{me}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1")
            os.write(written[1], b"1")
        finally:
            os._exit(0)
    os.close(written[1])
    try:
        call("unshare", NAMESPACES)
    finally:
        os.write(ready[1], b"1")
        done = os.read(written[0], 1)
        os.waitpid(writer, 0)
    if not done:
        raise Setup("the users of the namespace could not be mapped")


def write(path: str, text: str) -> None:
    """Into a file of /proc."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise Setup(f"{path}: {error.strerror}") from None


def build_box(folder: str, prefix: str, box_bytes: int) -> None:
    """A root of its own: the system's and the interpreter's files, read-only, and an empty folder in memory."""
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    for source in dict.fromkeys((*SYSTEM, prefix)):
        target = folder + source
        if source == prefix and prefix.startswith("/usr/"):
            continue
        if os.path.islink(source) and source != prefix:
            os.symlink(os.readlink(source), target)
        elif os.path.exists(source):
            os.makedirs(target if os.path.isdir(source) else os.path.dirname(target), exist_ok=True)
            if not os.path.isdir(source):
                open(target, "x").close()
            call("mount", source, target, None, MS_BIND | MS_REC, None)
            set_mount(target, AT_RECURSIVE, READ_ONLY | NO_SUID | (0 if source.startswith("/dev/") else NO_DEVICES))
    os.mkdir(folder + BOX)
    options = f"size={box_bytes},nr_inodes=4096,mode=700,uid={NOBODY},gid={NOBODY}".encode()
    call("mount", "tmpfs", folder + BOX, "tmpfs", MS_NOSUID | MS_NODEV, options)
    set_mount(folder, 0, READ_ONLY | NO_SUID)
    for name in ("shmmax", "msgmax", "sem"):  # memory and handles that no limit below counts
        try_write(f"/proc/sys/kernel/{name}", "0" if name != "sem" else "0 0 0 0")
    os.chdir(folder)
    call("pivot_root", ".", ".")
    call("umount2", ".", MNT_DETACH)
    os.chdir(BOX)


def set_mount(path: str, flags: int, attributes: int) -> None:
    """mount_setattr(2): of the whole tree below in one go, Linux 5.12."""
    values = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, values, ctypes.sizeof(values))


def try_write(path: str, text: str) -> None:
    """Where the kernel has it and allows it."""
    with contextlib.suppress(Setup):
        write(path, text)


def become_nobody() -> None:
    """Of root nothing is left; any capability goes when the program is started, since nobody has none."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def processes_of(uid: int) -> int:
    """Threads that the user has now: without a namespace the limit counts them too."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # it has just ended
            pass
    return count


def limit(settings: dict[str, Any], others: int) -> None:
    """Limits of each process of the program; `others` processes count in its number besides."""
    cpu = int(settings["seconds"]) + 1
    limits = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_NPROC: settings["processes"] + others,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def run_program(settings: dict[str, Any], status: int, others: int) -> str:
    """Fork, lock the last doors and start the program; returns how it ended, once it has."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            become_nobody()
            die_with(parent)  # a change of user clears it, so after that
            call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            limit(settings, others)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.execve(settings["argv"][0], settings["argv"], {})
        except (Setup, OSError, ValueError) as error:
            os.write(status, f"setup: {error}\n".encode())
        os._exit(1)
    while True:
        ended, code = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(code)
            return f"exit {code}" if code >= 0 else f"signal {-code}"


def put_files(settings: dict[str, Any]) -> None:
    """The program's files into the folder where it will stand."""
    for name, text in settings["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        os.chmod(name, 0o444)


def kill_descendants() -> None:
    """Those left over come to this process as to their parent; until there is none."""
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for child in file.read().split():
                    os.kill(int(child), signal.SIGKILL)
            os.wait()
        except ChildProcessError:
            return


def inside(settings: dict[str, Any], status: int) -> str:
    """The first process of the namespace."""
    build_box(settings["folder"], settings["prefix"], settings["box_bytes"])
    put_files(settings)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    return run_program(settings, status, 1 if os.getuid() == 0 else 2)  # root's own processes are another user's


def with_namespaces(settings: dict[str, Any], status: int) -> None:
    """This process stays outside and waits."""
    enter_namespaces()
    try_write("/proc/sys/user/max_user_namespaces", "0")  # a further one would bring capabilities back
    child = os.fork()
    if child:
        try:
            os.waitpid(child, 0)
        except Stop:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)  # it is over only when every process of its namespace is
        return
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.write(status, inside(settings, status).encode() + b"\n")
    except (Setup, OSError) as error:
        os.write(status, f"setup: {error}\n".encode())
    os._exit(0)


def with_limits(settings: dict[str, Any], status: int) -> None:
    """Only limits, a user that is nobody if this one is root, and an end of every descendant."""
    os.chdir(settings["folder"])
    put_files(settings)
    user = os.getuid()
    if user == 0:
        os.chown(".", NOBODY, NOBODY)
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        os.write(status, run_program(settings, status, processes_of(user or NOBODY)).encode() + b"\n")
    except Stop:
        pass
    finally:
        kill_descendants()


def stop(number: int, frame: Any) -> None:
    """Out of whatever this process waits for."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stop


def main() -> None:
    """See the top of this file."""
    settings_fd, status = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(status, False)
    signal.signal(signal.SIGTERM, stop)
    with open(settings_fd, encoding="utf-8") as file:
        settings = json.load(file)
    try:
        die_with(settings["parent"])
        {"namespaces": with_namespaces, "limits": with_limits}[settings["isolation"]](settings, status)
    except (Setup, OSError) as error:
        os.write(status, f"setup: {error}\n".encode())
    except Stop:  # before there was anything to end
        pass
    os._exit(0)


main()
