/* program.h - the whole program inside a fuzzer: commands with files, and a look at what they print. */

#define _POSIX_C_SOURCE 200809L

#ifndef PROGRAM_H
#define PROGRAM_H

#include "diffenc.h"

#include <fcntl.h>
#include <sanitizer/common_interface_defs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int diffenc_main(int argc, char **argv);

enum { PATH = 256, PRINTED = 1 << 14 };

/* A file in a directory of this process. */
static void place(const char *name, char path[PATH]) {
    const char *memory = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(path, PATH, "%s/fuzz.%ld", memory, (long)getpid());
    mkdir(path, 0700);
    snprintf(path, PATH, "%s/fuzz.%ld/%s", memory, (long)getpid(), name);
}

static void write_bytes(const char *path, const uint8_t *data, size_t size) {
    FILE *stream = fopen(path, "wb");
    if (!stream || fwrite(data, 1, size, stream) != size || fclose(stream) != 0)
        abort();
}

/* Run a command, its words with one space between. Whatever the files hold, only lines that a terminal may
 * show come out, and an exit status of the manual. */
static int program(const char *command) {
    char words[4 * PATH], path[PATH], text[PRINTED], shown[PRINTED], *argv[32];
    int argc = 0;
    snprintf(words, sizeof words, "diffenc %s", command);
    for (char *word = strtok(words, " "); word && argc < 31; word = strtok(NULL, " "))
        argv[argc++] = word;
    argv[argc] = NULL;
    place("printed", path);
    const int out = dup(1), error = dup(2), printed = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    __sanitizer_set_report_fd((void *)(intptr_t)error);
    dup2(printed, 1);
    dup2(printed, 2);
    const int status = diffenc_main(argc, argv);
    fflush(stdout);
    dup2(out, 1);
    dup2(error, 2);
    __sanitizer_set_report_fd((void *)(intptr_t)2);
    const ssize_t size = pread(printed, text, sizeof text - 1, 0);
    close(out);
    close(error);
    close(printed);
    if (size < 0 || status < 0 || status > 2 || (status > 0 && size == 0) || memchr(text, 0, (size_t)size))
        abort();
    text[size] = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        printable(line, shown, sizeof shown);
        if (strcmp(line, shown) != 0) {
            fprintf(stderr, "printed: %s\n", shown);
            abort();
        }
    }
    return status;
}

#endif
