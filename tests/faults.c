/* Preloaded into a process that writes: every call that changes something below one folder is
   counted, and from a chosen one on the disk is full, or the process is killed before it. The
   clock of the day can be made to jump; the one that only goes on is left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { COUNT, FULL, KILL };

static char folder[PATH_MAX];
static int mode = COUNT, jumping;
static long at = -1, calls, looks;

/* From now on count what happens below `place`, and fault from call number `first` on. */
void faults_arm(const char *place, int what, long first, int clock_jumps) {
  snprintf(folder, sizeof folder, "%s", place);
  mode = what, at = first, jumping = clock_jumps, calls = 0;
}

long faults_calls(void) { return calls; }

static int below(const char *path) {
  size_t length = strlen(folder);
  return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int at_path(int place, const char *path) {
  char found[PATH_MAX] = "", link[64];
  if (path[0] == '/') return below(path);
  if (place == AT_FDCWD) return getcwd(found, sizeof found) && below(found);
  snprintf(link, sizeof link, "/proc/self/fd/%d", place);
  return readlink(link, found, sizeof found - 1) > 0 && below(found);
}

static int of_file(int number) {
  char found[PATH_MAX] = "", link[64];
  if (!*folder) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", number);
  return readlink(link, found, sizeof found - 1) > 0 && below(found);
}

/* Whether the call must fail; `grows`: whether it asks the disk for room. */
static int fault(int ours, int grows) {
  if (!ours) return 0;
  long number = __atomic_fetch_add(&calls, 1, __ATOMIC_SEQ_CST);
  if (at < 0 || number < at) return 0;
  if (mode == KILL) kill(getpid(), SIGKILL);
  if (mode != FULL || !grows) return 0;
  errno = ENOSPC;
  return 1;
}

#define NEXT(type, name, ...) \
  static type (*next)(__VA_ARGS__); \
  if (!next) *(void **)&next = dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    NEXT(int, name, const char *, int, ...); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (flags & O_CREAT && fault(at_path(AT_FDCWD, path), 1)) return -1; \
    return next(path, flags, bits); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int place, const char *path, int flags, ...) { \
    NEXT(int, name, int, const char *, int, ...); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (flags & O_CREAT && fault(at_path(place, path), 1)) return -1; \
    return next(place, path, flags, bits); \
  }
OPENAT(openat)
OPENAT(openat64)

#define ON_FILE(type, name, grows, file, parameters, arguments) \
  type name parameters { \
    static type(*next) parameters; \
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, #name); \
    return fault(of_file(file), grows) ? (type)-1 : next arguments; \
  }
ON_FILE(ssize_t, write, 1, file, (int file, const void *data, size_t count), (file, data, count))
ON_FILE(ssize_t, pwrite, 1, file, (int file, const void *data, size_t count, off_t place),
        (file, data, count, place))
ON_FILE(ssize_t, pwrite64, 1, file, (int file, const void *data, size_t count, off64_t place),
        (file, data, count, place))
ON_FILE(ssize_t, writev, 1, file, (int file, const struct iovec *parts, int count),
        (file, parts, count))
ON_FILE(ssize_t, sendfile, 1, file, (int file, int from, off_t *place, size_t count),
        (file, from, place, count))
ON_FILE(ssize_t, sendfile64, 1, file, (int file, int from, off64_t *place, size_t count),
        (file, from, place, count))
ON_FILE(ssize_t, copy_file_range, 1, file,
        (int from, off64_t *there, int file, off64_t *here, size_t count, unsigned flags),
        (from, there, file, here, count, flags))
ON_FILE(int, ftruncate, 1, file, (int file, off_t size), (file, size))
ON_FILE(int, ftruncate64, 1, file, (int file, off64_t size), (file, size))
ON_FILE(int, fsync, 1, file, (int file), (file))
ON_FILE(int, fdatasync, 1, file, (int file), (file))

#define ON_PATH(name, grows, place, path, parameters, arguments) \
  int name parameters { \
    static int(*next) parameters; \
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, #name); \
    return fault(at_path(place, path), grows) ? -1 : next arguments; \
  }
ON_PATH(mkdir, 1, AT_FDCWD, path, (const char *path, mode_t bits), (path, bits))
ON_PATH(mkdirat, 1, place, path, (int place, const char *path, mode_t bits), (place, path, bits))
ON_PATH(rename, 0, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(renameat, 0, there, to, (int here, const char *from, int there, const char *to),
        (here, from, there, to))
ON_PATH(renameat2, 0, there, to,
        (int here, const char *from, int there, const char *to, unsigned flags),
        (here, from, there, to, flags))
ON_PATH(unlink, 0, AT_FDCWD, path, (const char *path), (path))
ON_PATH(unlinkat, 0, place, path, (int place, const char *path, int flags), (place, path, flags))
ON_PATH(rmdir, 0, AT_FDCWD, path, (const char *path), (path))

/* Three years on, five back, and so on, each time that somebody looks. */
static time_t jump(void) {
  long look = __atomic_fetch_add(&looks, 1, __ATOMIC_SEQ_CST);
  return jumping ? (look % 2 ? -5 : 3) * 31536000L : 0;
}

int clock_gettime(clockid_t which, struct timespec *now) {
  NEXT(int, clock_gettime, clockid_t, struct timespec *);
  int found = next(which, now);
  if (!found && which == CLOCK_REALTIME) now->tv_sec += jump();
  return found;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  NEXT(int, gettimeofday, struct timeval *, void *);
  int found = next(now, zone);
  if (!found) now->tv_sec += jump();
  return found;
}

time_t time(time_t *told) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (told) *told = now.tv_sec;
  return now.tv_sec;
}
