/* Makes calls that change files below a folder fail: preloaded (LD_PRELOAD), and told by `faults_arm` which call.

   Calls are counted from 1 in the order in which they come, over all threads and all forked processes: the state lies in
   shared memory. A write that fails leaves half of its bytes, and a close that fails has closed. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_CALLS 16384
#define LONGEST_RECORD 256

struct state {
    int is_armed, error, for_good, deletions_work;
    long first;
    char folder[PATH_MAX];
    atomic_long n_calls, n_failed;
    char calls[MOST_CALLS][LONGEST_RECORD];
};
static struct state *state;

__attribute__((constructor)) static void make_state(void) {
    void *place = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    state = place == MAP_FAILED ? NULL : place;
}

/* --- for Python, through ctypes --- */

/* Fail call number `first` below `folder` with `error`; `for_good`: the later ones too, but for deletions where they work;
   `first` 0 only counts. Returns 0, or -1 where the folder's name is too long. */
int faults_arm(const char *folder, long first, int error, int for_good, int deletions_work) {
    if (!state || strlen(folder) >= sizeof state->folder)
        return -1;
    strcpy(state->folder, folder);
    state->first = first, state->error = error, state->for_good = for_good, state->deletions_work = deletions_work;
    atomic_store(&state->n_calls, 0);
    atomic_store(&state->n_failed, 0);
    state->is_armed = 1;
    return 0;
}

void faults_disarm(void) { state->is_armed = 0; }

long faults_n_calls(void) { return atomic_load(&state->n_calls); }

long faults_n_failed(void) { return atomic_load(&state->n_failed); }

/* What call number `n` was: its name and path. */
const char *faults_call(long n) { return n >= 1 && n <= MOST_CALLS ? state->calls[n - 1] : ""; }

/* --- which calls fail --- */

static int is_below(const char *path) {
    size_t length = strlen(state->folder);
    return strncmp(path, state->folder, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

/* The error of this call, or 0 where it is to work. */
static int fault(const char *name, const char *path) {
    if (!is_below(path))
        return 0;
    long n = atomic_fetch_add(&state->n_calls, 1) + 1;
    if (n <= MOST_CALLS)
        snprintf(state->calls[n - 1], LONGEST_RECORD, "%s %s", name, path);
    int is_deletion = strcmp(name, "unlink") == 0 || strcmp(name, "rmdir") == 0;
    int fails = n == state->first;
    if (state->first && n > state->first && state->for_good)
        fails = !(is_deletion && state->deletions_work);
    if (fails)
        atomic_fetch_add(&state->n_failed, 1);
    return fails ? state->error : 0;
}

static int is_watching(void) { return state && state->is_armed; }

static int path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = '\0';
    return length >= 0;
}

static int fault_at(const char *name, int folder, const char *path) {
    char whole[2 * PATH_MAX];
    if (!is_watching() || !path)
        return 0;
    if (path[0] == '/')
        return fault(name, path);
    if (folder == AT_FDCWD ? !getcwd(whole, PATH_MAX) : !path_of(folder, whole))
        return 0;
    size_t length = strlen(whole);
    snprintf(whole + length, PATH_MAX, "/%s", path);
    return fault(name, whole);
}

static int fault_of(const char *name, int descriptor) {
    char path[PATH_MAX];
    int before = errno;
    int error = is_watching() && path_of(descriptor, path) ? fault(name, path) : 0;
    errno = before;
    return error;
}

static int is_writable(int descriptor) {
    int before = errno, flags = fcntl(descriptor, F_GETFL);
    errno = before;
    return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY;
}

/* --- the calls --- */

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define FAIL_IF(fault) \
    do { \
        int error_ = (fault); \
        if (error_) { \
            errno = error_; \
            return -1; \
        } \
    } while (0)

static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); }

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE(flags) \
        if (changes(flags)) \
            FAIL_IF(fault_at("open", AT_FDCWD, path)); \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        MODE(flags) \
        if (changes(flags)) \
            FAIL_IF(fault_at("open", folder, path)); \
        return real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name) \
    int name(const char *path, mode_t mode) { \
        REAL(name); \
        FAIL_IF(fault_at("open", AT_FDCWD, path)); \
        return real(path, mode); \
    }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        int error = strpbrk(mode, "wa+") ? fault_at("open", AT_FDCWD, path) : 0; \
        if (error) { \
            errno = error; \
            return NULL; \
        } \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int descriptor, const void *bytes, size_t size) {
    REAL(write);
    int error = fault_of("write", descriptor);
    if (!error)
        return real(descriptor, bytes, size);
    if (real(descriptor, bytes, size / 2) < 0) {
    } /* as many as there is room for */
    errno = error;
    return -1;
}

#define PWRITE(name, offset_type) \
    ssize_t name(int descriptor, const void *bytes, size_t size, offset_type offset) { \
        REAL(name); \
        int error = fault_of("pwrite", descriptor); \
        if (!error) \
            return real(descriptor, bytes, size, offset); \
        if (real(descriptor, bytes, size / 2, offset) < 0) { \
        } \
        errno = error; \
        return -1; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *parts, int n) {
    REAL(writev);
    FAIL_IF(fault_of("write", descriptor));
    return real(descriptor, parts, n);
}

#define SENDFILE(name, offset_type) \
    ssize_t name(int to, int from, offset_type *offset, size_t size) { \
        REAL(name); \
        FAIL_IF(fault_of("write", to)); \
        return real(to, from, offset, size); \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *place, size_t size, unsigned flags) {
    REAL(copy_file_range);
    FAIL_IF(fault_of("write", to));
    return real(from, start, to, place, size, flags);
}

#define SYNC(name) \
    int name(int descriptor) { \
        REAL(name); \
        FAIL_IF(fault_of(#name, descriptor)); \
        return real(descriptor); \
    }
SYNC(fsync)
SYNC(fdatasync)

#define FTRUNCATE(name, offset_type) \
    int name(int descriptor, offset_type length) { \
        REAL(name); \
        FAIL_IF(fault_of("ftruncate", descriptor)); \
        return real(descriptor, length); \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

#define FALLOCATE(name, offset_type) \
    int name(int descriptor, offset_type offset, offset_type length) { \
        REAL(name); \
        int error = fault_of("fallocate", descriptor); \
        return error ? error : real(descriptor, offset, length); \
    }
FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)

int rename(const char *old, const char *new) {
    REAL(rename);
    FAIL_IF(fault_at("rename", AT_FDCWD, new));
    return real(old, new);
}

int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    REAL(renameat);
    FAIL_IF(fault_at("rename", new_folder, new));
    return real(old_folder, old, new_folder, new);
}

int unlink(const char *path) {
    REAL(unlink);
    FAIL_IF(fault_at("unlink", AT_FDCWD, path));
    return real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    FAIL_IF(fault_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path));
    return real(folder, path, flags);
}

int rmdir(const char *path) {
    REAL(rmdir);
    FAIL_IF(fault_at("rmdir", AT_FDCWD, path));
    return real(path);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    FAIL_IF(fault_at("mkdir", AT_FDCWD, path));
    return real(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    FAIL_IF(fault_at("mkdir", folder, path));
    return real(folder, path, mode);
}

int close(int descriptor) {
    REAL(close);
    int error = is_watching() && is_writable(descriptor) ? fault_of("close", descriptor) : 0;
    int result = real(descriptor);
    FAIL_IF(error);
    return result;
}

int fclose(FILE *file) {
    REAL(fclose);
    int descriptor = file ? fileno(file) : -1;
    int error = descriptor >= 0 && is_watching() && is_writable(descriptor) ? fault_of("close", descriptor) : 0;
    int result = real(file);
    if (error) {
        errno = error;
        return EOF;
    }
    return result;
}
