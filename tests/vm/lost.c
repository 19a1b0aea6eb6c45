/* Uses files in one of many ways until that fails, and says with what. "begun" is said when it has worked once. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE = 4096, LARGE = 1 << 20 };

static const char *path;
static long size;

static void say(const char *what, long result) {
	printf("%s: %s\n", what, result < 0 ? strerrorname_np(errno) : "well");
	fflush(stdout);
}

static void begun(void) {
	static int said;
	if (!said++) { puts("begun"); fflush(stdout); }
}

static long must(long result, const char *what) {
	if (result < 0) { say(what, result); exit(1); }
	return result;
}

static int opened(int flags) {
	return must(open(path, flags, 0600), "open");
}

static void end(int fd) {
	struct statx found;
	say("fsync", fsync(fd));
	say("stat", statx(AT_FDCWD, path, AT_STATX_FORCE_SYNC, STATX_SIZE, &found));
	say("open", open(path, O_RDONLY));
	close(fd);
}

static void writes(void) {
	static char data[PAGE];
	int fd = opened(O_WRONLY | O_CREAT | O_TRUNC);
	long result;
	for (long at = 0; (result = pwrite(fd, data, PAGE, at % LARGE)) == PAGE; at += PAGE) begun();
	say("write", result);
	end(fd);
}

static void reads(void) {
	static char data[PAGE];
	int fd = opened(O_RDONLY);
	long result;
	for (long at = 0; (result = pread(fd, data, PAGE, at % size)) == PAGE; at += PAGE) {
		posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
		begun();
	}
	say("read", result);
	end(fd);
}

/* Ends by SIGBUS. */
static void maps(void) {
	int fd = opened(O_RDONLY);
	volatile char *data = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
	for (long at = 0;; at += PAGE) {
		(void)data[at % size];
		madvise((void *)data, size, MADV_DONTNEED);
		posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
		begun();
	}
}

static void lists(void) {
	DIR *directory;
	while ((directory = opendir(path))) {
		errno = 0;
		while (readdir(directory)) {}
		if (errno) break;
		closedir(directory);
		begun();
	}
	say("list", -1);
}

/* What it writes is in the guest's memory when it is told to go on. */
static void dirties(void) {
	static char data[LARGE];
	int fd = opened(O_WRONLY | O_CREAT | O_TRUNC);
	must(write(fd, data, LARGE), "write");
	begun();
	getchar();
	end(fd);
}

/* So many requests at once, of which none is answered: through the page cache, past it, and those of which any number may
 * be under way. */
static int count, *ends, files[2];
static volatile int under_way, over;
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

static void *one(void *number) {
	long at = (long)number * PAGE % size, result;
	void *data = aligned_alloc(PAGE, PAGE);
	struct statx found;
	pthread_mutex_lock(&gate);
	pthread_mutex_unlock(&gate);
	__atomic_add_fetch(&under_way, 1, __ATOMIC_SEQ_CST);
	if ((long)number % 8 < 2)
		result = pread(files[(long)number % 2], data, PAGE, at);
	else
		result = statx(files[0], "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_SIZE, &found);
	ends[(long)number] = result < 0 ? errno : 0;
	__atomic_add_fetch(&over, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

/* Those of its threads that aren't running. */
static int waiting(void) {
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *task;
	int found = 0;
	while ((task = readdir(tasks))) {
		char name[300], line[300] = "", *state;
		snprintf(name, sizeof name, "/proc/self/task/%s/stat", task->d_name);
		FILE *file = fopen(name, "r");
		if (!file) continue;
		if (fgets(line, sizeof line, file) && (state = strstr(line, ") "))) found += strchr("SD", state[2]) != NULL;
		fclose(file);
	}
	closedir(tasks);
	return found;
}

static void many(void) {
	pthread_t *threads = calloc(count, sizeof *threads);
	pthread_attr_t small;
	int failed = 0;
	files[0] = opened(O_RDONLY);
	files[1] = opened(O_RDONLY | O_DIRECT);
	ends = calloc(count, sizeof *ends);
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 64 * 1024);
	pthread_mutex_lock(&gate);
	for (long i = 0; i < count; i++) must(-pthread_create(&threads[i], &small, one, (void *)i), "thread");
	begun();
	getchar();
	pthread_mutex_unlock(&gate);
	while (under_way < count || waiting() + over < count) usleep(10000);
	printf("%d wait\n", count - over);
	fflush(stdout);
	for (int i = 0; i < count; i++) {
		pthread_join(threads[i], NULL);
		failed += ends[i] == ENOTCONN || ends[i] == EIO;
	}
	printf("%d of %d failed\n", failed, count);
}

int main(int argc, char **argv) {
	struct stat found;
	const char *how = argv[1];
	path = argv[2];
	count = argc > 3 ? atoi(argv[3]) : 0;
	if (!stat(path, &found)) size = found.st_size;
	if (!strcmp(how, "write")) writes();
	if (!strcmp(how, "read")) reads();
	if (!strcmp(how, "map")) maps();
	if (!strcmp(how, "list")) lists();
	if (!strcmp(how, "dirty")) dirties();
	if (!strcmp(how, "many")) many();
	return 0;
}
