"""The sandbox's launcher process (standard library only): isolates itself, then runs a program.

    python -I -S confine.py SETTINGS_FD STATUS_FD

SETTINGS_FD holds JSON (see `sandbox.run_python`). STATUS_FD receives one line: `setup: REASON`, `exit N` or `signal N`.
There are three processes: this one; with namespaces, the init process of a PID namespace, whose end kills all others in
it; and the program. Each is killed when its parent ends.
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
    """The sandbox cannot be set up, so the program is not run."""


class Stop(Exception):
    """SIGTERM (the time limit): end the program, then this process."""


def call(name: str, *args: Any) -> None:
    """Call a libc function by name. Raises Setup with the reason if it fails."""
    encoded = [
        arg.encode() if isinstance(arg, str) else ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args
    ]
    if getattr(libc, name)(*encoded) == -1:
        raise Setup(f"{name}({', '.join(map(str, args[:2]))}): {os.strerror(ctypes.get_errno())}")


def die_with(parent: int) -> None:
    """Have this process killed when the parent ends; exit if it has ended already."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def enter_namespaces() -> None:
    """Enter new user, mount, PID, network, IPC and UTS namespaces, as an unprivileged user outside."""
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        call("unshare", NAMESPACES)
        write_proc("/proc/self/setgroups", "deny")
        write_proc("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        write_proc("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        return
    # Root stays root while it builds the root file system, and becomes nobody in it. A map of two users must be
    # written from outside the namespace.
    ready, written = os.pipe(), os.pipe()
    me = os.getpid()
    writer = os.fork()
    if writer == 0:
        os.close(ready[1])  # else it would wait for itself if the parent were killed
        try:
            os.read(ready[0], 1)
            for name in ("uid_map", "gid_map"):
                write_proc(f"/proc/{me}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1")
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
        raise Setup("the user ids of the namespace could not be mapped")


def write_proc(path: str, text: str) -> None:
    """Write a file of /proc. Raises Setup."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise Setup(f"{path}: {error.strerror}") from None


def build_box(folder: str, prefix: str, box_bytes: int) -> None:
    """Build and enter a new root: the system's and the interpreter's files read-only, and an empty tmpfs folder."""
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
    for name in ("shmmax", "msgmax", "sem"):  # resources that the rlimits do not cover
        try_write(f"/proc/sys/kernel/{name}", "0" if name != "sem" else "0 0 0 0")
    os.chdir(folder)
    call("pivot_root", ".", ".")
    call("umount2", ".", MNT_DETACH)
    os.chdir(BOX)


def set_mount(path: str, flags: int, attributes: int) -> None:
    """mount_setattr(2), recursive with AT_RECURSIVE; Linux 5.12."""
    values = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, values, ctypes.sizeof(values))


def try_write(path: str, text: str) -> None:
    """As `write_proc`, but ignores failures."""
    with contextlib.suppress(Setup):
        write_proc(path, text)


def become_nobody() -> None:
    """Drop root for the user nobody; capabilities are lost at exec."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def processes_of(uid: int) -> int:
    """Current number of the user's threads, which RLIMIT_NPROC also counts without a user namespace."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # it has just ended
            pass
    return count


def limit(settings: dict[str, Any], others: int) -> None:
    """Set the rlimits of the program; `others` is the number of further processes that RLIMIT_NPROC counts."""
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
    """Fork, drop privileges, set limits and exec the program; returns `exit N` or `signal N` when it has ended."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            become_nobody()
            die_with(parent)  # changing the user clears it, so it comes after
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
    """Write the program's files into its working folder."""
    for name, text in settings["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        os.chmod(name, 0o444)


def kill_descendants() -> None:
    """Kill all remaining descendants, which are reparented to this process (a subreaper)."""
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for child in file.read().split():
                    os.kill(int(child), signal.SIGKILL)
            os.wait()
        except ChildProcessError:
            return


def inside(settings: dict[str, Any], status: int) -> str:
    """The init process of the PID namespace."""
    build_box(settings["folder"], settings["prefix"], settings["box_bytes"])
    put_files(settings)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    return run_program(settings, status, 1 if os.getuid() == 0 else 2)  # root's processes belong to another user


def with_namespaces(settings: dict[str, Any], status: int) -> None:
    """Isolate with namespaces; this process stays outside and waits."""
    enter_namespaces()
    try_write("/proc/sys/user/max_user_namespaces", "0")  # a nested user namespace would regain capabilities
    child = os.fork()
    if child:
        try:
            os.waitpid(child, 0)
        except Stop:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)  # returns when all processes of its namespace have ended
        return
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.write(status, inside(settings, status).encode() + b"\n")
    except (Setup, OSError) as error:
        os.write(status, f"setup: {error}\n".encode())
    os._exit(0)


def with_limits(settings: dict[str, Any], status: int) -> None:
    """Isolate with rlimits only; drop root for nobody, and kill all descendants at the end."""
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
    """SIGTERM handler: interrupt what this process waits for."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stop


def main() -> None:
    """See the module docstring."""
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
    except Stop:  # nothing was started yet
        pass
    os._exit(0)


main()
