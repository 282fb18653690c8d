/* What a process does to the files of a folder: recorded, and failing on demand.

Preloaded in a process. Environment:

NEO_DISK_FOLDER   files whose path begins so are concerned, but for those that need not
                  survive (SQLite's index of its log, lock files)
NEO_DISK_RECORD   file that gets a record for each call, see `struct record`; optional
NEO_DISK_CONTROL  file with a `struct control`, which may change at any time; optional
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CREATE = 1, WRITE, TRUNCATE, SYNC, UNLINK, RENAME };

struct record { /* then the path, then the data (RENAME: the new path) */
    uint8_t op, error;
    uint16_t path_size;
    uint32_t data_size;
    int64_t offset; /* TRUNCATE: the new size */
};

struct control {
    int64_t countdown; /* the call that fails: the next one if 1; never if 0 */
    int32_t ops; /* those that count and fail, as bits `1 << op` */
    int32_t error;
    int32_t forever; /* whether all that follow fail too */
    int32_t failed; /* calls that failed */
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static const char *folder;
static int record_fd = -1;
static struct control *control;

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (!next) next = (__typeof__(next))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void prepare(void)
{
    const char *path;
    folder = getenv("NEO_DISK_FOLDER");
    if ((path = getenv("NEO_DISK_RECORD")))
        record_fd = syscall(SYS_openat, AT_FDCWD, path,
                            O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if ((path = getenv("NEO_DISK_CONTROL"))) {
        int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
        control = mmap(0, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        syscall(SYS_close, fd);
    }
}

static int ends_with(const char *text, const char *end)
{
    size_t a = strlen(text), b = strlen(end);
    return a >= b && !strcmp(text + a - b, end);
}

static int concerned(const char *path)
{
    return folder && !strncmp(path, folder, strlen(folder))
        && !ends_with(path, "-shm") && !ends_with(path, ".lock");
}

static const char *path_of(int fd, char *path)
{
    char link[32];
    ssize_t size;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    size = syscall(SYS_readlinkat, AT_FDCWD, link, path, 4095);
    if (size < 0)
        return 0;
    path[size] = 0;
    return concerned(path) ? path : 0;
}

/* Whether this call fails; then errno says why. */
static int fails(int op)
{
    if (!control || !(control->ops & 1 << op) || !control->countdown)
        return 0;
    if (control->countdown > 1) {
        control->countdown--;
        return 0;
    }
    if (!control->forever)
        control->countdown = 0;
    control->failed++;
    errno = control->error;
    return 1;
}

static void append(const void *data, size_t size)
{
    while (size) {
        ssize_t done = syscall(SYS_write, record_fd, data, size);
        if (done <= 0)
            abort();
        data = (const char *)data + done;
        size -= done;
    }
}

static void record(int op, int error, const char *path, const void *data, size_t size,
                   int64_t offset)
{
    struct record head = { op, error, strlen(path), size, offset };
    int saved = errno;
    if (record_fd < 0)
        return;
    append(&head, sizeof head);
    append(path, head.path_size);
    append(data, size);
    errno = saved;
}

static int opened(int fd, int existed, int flags)
{
    char path[4096];
    if (fd >= 0 && (!existed || flags & O_TRUNC) && path_of(fd, path)) {
        if (!existed)
            record(CREATE, 0, path, 0, 0, 0);
        else
            record(TRUNCATE, 0, path, 0, 0, 0);
    }
    return fd;
}

#define OPEN(call) \
    int fd, existed, mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list args; \
        va_start(args, flags); \
        mode = va_arg(args, int); \
        va_end(args); \
    } \
    if (!(flags & (O_CREAT | O_TRUNC))) \
        return call; \
    pthread_mutex_lock(&mutex); \
    existed = !access(name, F_OK); \
    fd = opened(call, existed, flags); \
    pthread_mutex_unlock(&mutex); \
    return fd

int open(const char *name, int flags, ...)
{
    NEXT(open);
    OPEN(next(name, flags, mode));
}

int open64(const char *name, int flags, ...)
{
    NEXT(open64);
    OPEN(next(name, flags, mode));
}

/* Do it, or fail, if the file is concerned; else just do it. */
#define CALL(type, op, fd, ...) \
    char path[4096]; \
    type done; \
    if (!path_of(fd, path)) \
        return next(__VA_ARGS__); \
    pthread_mutex_lock(&mutex); \
    done = fails(op) ? -1 : next(__VA_ARGS__)

#define END \
    pthread_mutex_unlock(&mutex); \
    return done

ssize_t write(int fd, const void *data, size_t size)
{
    NEXT(write);
    CALL(ssize_t, WRITE, fd, fd, data, size);
    if (done > 0)
        record(WRITE, 0, path, data, done, lseek(fd, 0, SEEK_CUR) - done);
    END;
}

#define PWRITE(name, offset_type) \
    ssize_t name(int fd, const void *data, size_t size, offset_type offset) \
    { \
        NEXT(name); \
        CALL(ssize_t, WRITE, fd, fd, data, size, offset); \
        if (done > 0) \
            record(WRITE, 0, path, data, done, offset); \
        END; \
    }

PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define FTRUNCATE(name, size_type) \
    int name(int fd, size_type size) \
    { \
        NEXT(name); \
        CALL(int, TRUNCATE, fd, fd, size); \
        if (!done) \
            record(TRUNCATE, 0, path, 0, 0, size); \
        END; \
    }

FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

#define FSYNC(name) \
    int name(int fd) \
    { \
        NEXT(name); \
        CALL(int, SYNC, fd, fd); \
        record(SYNC, done ? errno : 0, path, 0, 0, 0); \
        END; \
    }

FSYNC(fsync)
FSYNC(fdatasync)

int unlink(const char *path)
{
    int done;
    NEXT(unlink);
    if (!concerned(path))
        return next(path);
    pthread_mutex_lock(&mutex);
    if (!(done = fails(UNLINK) ? -1 : next(path)))
        record(UNLINK, 0, path, 0, 0, 0);
    END;
}

int rename(const char *path, const char *to)
{
    int done;
    NEXT(rename);
    if (!concerned(path))
        return next(path, to);
    pthread_mutex_lock(&mutex);
    if (!(done = fails(RENAME) ? -1 : next(path, to)))
        record(RENAME, 0, path, to, strlen(to), 0);
    END;
}
