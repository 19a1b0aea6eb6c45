/* Writes to its stdout in all ways that Linux has, some of whose pages others have as well. The byte at each place of the
 * stream is the place modulo 251; how many there were is said on stderr. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PERIOD = 251, KIB = 1024, LARGE = 128 * KIB, PAGE = 4096 };

static long total;

static void fill(unsigned char *to, long size, long at) {
	for (long i = 0; i < size; i++) to[i] = (at + i) % PERIOD;
}

static long must(long result, const char *what) {
	if (result < 0) { perror(what); exit(1); }
	return result;
}

static void written(long size) {
	unsigned char *data = malloc(size);
	fill(data, size, total);
	for (long done = 0; done < size;) done += must(write(1, data + done, size - done), "write");
	total += size;
	free(data);
}

/* Pages of this process, which it gives up at once: then only the pipe has them. */
static void vmspliced(long size) {
	unsigned char *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(data, size, MADV_HUGEPAGE);
	fill(data, size, total);
	for (long done = 0; done < size;) {
		struct iovec rest = {data + done, size - done};
		done += must(vmsplice(1, &rest, 1, 0), "vmsplice");
	}
	total += size;
	munmap(data, size);
}

/* Pages of a file. */
static void spliced(int file, long size) {
	loff_t at = total % PERIOD;
	for (long left = size; left > 0;) left -= must(splice(file, &at, 1, NULL, left, 0), "splice a file");
	total += size;
}

/* Pages that are in another pipe too, and then parts of these. */
static void teed(int *pipe, long size) {
	unsigned char *data = malloc(size);
	fill(data, size, total);
	must(write(pipe[1], data, size), "write to a pipe");
	long shared = must(tee(pipe[0], 1, size, 0), "tee");
	total += shared;
	for (long left = shared; left > 0;) left -= must(read(pipe[0], data, left), "read");
	for (long left = size - shared; left > 0;) {
		long part = must(splice(pipe[0], NULL, 1, NULL, left < 10001 ? left : 10001, 0), "splice a pipe");
		left -= part;
		total += part;
	}
	free(data);
}

/* As much as can be read of a buffer whose end isn't there. */
static void torn(void) {
	unsigned char *data = mmap(NULL, LARGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	munmap(data + LARGE - 5 * PAGE, 5 * PAGE);
	fill(data, LARGE - 5 * PAGE, total);
	total += must(write(1, data, LARGE), "write of what isn't there");
	munmap(data, LARGE);
}

int main(void) {
	int pipe[2], file = open("/tmp/pattern", O_RDWR | O_CREAT, 0600);
	unsigned char *pattern = malloc(LARGE * 2);
	fill(pattern, LARGE * 2, 0);
	must(write(file, pattern, LARGE * 2), "write to a file");
	must(pipe2(pipe, 0), "pipe");
	must(fcntl(pipe[1], F_SETPIPE_SZ, 1024 * KIB), "F_SETPIPE_SZ");
	for (int round = 0; round < 48; round++) {
		written(4 * LARGE);
		written(round * 577 + 1);
		vmspliced(LARGE);
		spliced(file, 70001);
		written(LARGE + 3);
		teed(pipe, LARGE);
		teed(pipe, 333);
		torn();
	}
	fprintf(stderr, "%ld\n", total);
}
