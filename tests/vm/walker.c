/* Prints a file tree, one line for each file: what must be the same wherever an image is unpacked. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

static const char *root;

static void quoted(const unsigned char *text, size_t size) {
    for (size_t i = 0; i < size; i++)
        if (text[i] > 32 && text[i] < 127 && text[i] != '%') putchar(text[i]); else printf("%%%02x", text[i]);
}

static uint64_t content(const char *path) {      /* FNV-1a */
    unsigned char buffer[1 << 16];
    uint64_t hash = 0xcbf29ce484222325u;
    ssize_t count;
    int fd = open(path, O_RDONLY | O_NOFOLLOW);
    if (fd < 0) { perror(path); exit(1); }
    while ((count = read(fd, buffer, sizeof buffer)) > 0)
        for (ssize_t i = 0; i < count; i++) hash = (hash ^ buffer[i]) * 0x100000001b3u;
    if (count < 0) { perror(path); exit(1); }
    close(fd);
    return hash;
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static void attributes(const char *path) {
    char names[4096], value[4096], *sorted[64];
    int found = 0;
    ssize_t size = llistxattr(path, names, sizeof names);
    for (char *name = names; size > 0 && name < names + size && found < 64; name += strlen(name) + 1)
        sorted[found++] = name;
    qsort(sorted, found, sizeof *sorted, by_name);
    for (int i = 0; i < found; i++) {
        if (strncmp(sorted[i], "trusted.overlay.", 16) == 0) continue;
        ssize_t length = lgetxattr(path, sorted[i], value, sizeof value);
        printf(" %s=", sorted[i]);
        quoted((unsigned char *)value, length > 0 ? length : 0);
    }
}

static void walk(const char *path) {
    /* What every container has of its own. */
    static const char *const skipped[] = {"/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf",
                                          "/etc/machine-id", "/run"};
    const char *inside = path + strlen(root);
    struct stat s;
    for (size_t i = 0; i < sizeof skipped / sizeof *skipped; i++)
        if (strcmp(inside, skipped[i]) == 0) return;
    if (lstat(*path ? path : "/", &s)) { perror(path); exit(1); }
    quoted((const unsigned char *)(*inside ? inside : "/"), strlen(*inside ? inside : "/"));
    printf(" %o %u:%u", s.st_mode, s.st_uid, s.st_gid);
    if (S_ISCHR(s.st_mode) || S_ISBLK(s.st_mode)) printf(" %u:%u", major(s.st_rdev), minor(s.st_rdev));
    if (S_ISREG(s.st_mode)) printf(" %llu %016llx", (unsigned long long)s.st_size, (unsigned long long)content(path));
    if (S_ISLNK(s.st_mode)) {
        char target[4096];
        ssize_t length = readlink(path, target, sizeof target);
        printf(" -> ");
        quoted((unsigned char *)target, length > 0 ? length : 0);
    }
    attributes(*path ? path : "/");
    putchar('\n');
    if (!S_ISDIR(s.st_mode)) return;
    struct dirent **entries;
    int count = scandir(*path ? path : "/", &entries, NULL, alphasort);
    if (count < 0) { perror(path); exit(1); }
    for (int i = 0; i < count; i++) {
        char *child;
        if (strcmp(entries[i]->d_name, ".") && strcmp(entries[i]->d_name, "..")
            && asprintf(&child, "%s/%s", path, entries[i]->d_name) > 0) {
            walk(child);
            free(child);
        }
        free(entries[i]);
    }
    free(entries);
}

int main(int argc, char **argv) {
    root = argc > 1 ? argv[1] : "";
    walk(root);
    return 0;
}
