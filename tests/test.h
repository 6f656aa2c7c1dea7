/* test.h - the least a test program needs: CHECK counts, test_report tells and gives the exit status. */

#ifndef TEST_H
#define TEST_H

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* 1 where a sanitizer needs memory and time of its own. */
#if defined __has_feature
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define SANITIZED 1
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

static int test_passed, test_failed;

/* Count one check; when `condition` does not hold, print where and the message, which is a printf format. */
#define CHECK(condition, ...) test_check((condition) ? 1 : 0, __FILE__, __LINE__, __VA_ARGS__)

static void test_check(int holds, const char *file, int line, const char *format, ...) {
    va_list arguments;
    if (holds) {
        test_passed++;
        return;
    }
    test_failed++;
    if (test_failed > 50)
        return;   /* the first ones tell the most */
    printf("%s:%d: ", file, line);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
}

/* "test_data: 123 passed, 0 failed", with the name of the file that calls. Returns the exit status. */
#define test_report() test_report_of(__FILE__)

static int test_report_of(const char *file) {
    const char *slash = strrchr(file, '/'), *name = slash != NULL ? slash + 1 : file;
    printf("%.*s: %d passed, %d failed\n", (int)strcspn(name, "."), name, test_passed, test_failed);
    return test_failed > 0;
}

#endif
