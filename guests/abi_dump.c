/* SPDX-License-Identifier: Apache-2.0 */
/* Prints the protocol as JSON, from the lists of abi.h: what test/guest/abi.test.ts compares abi.ts with. */
#include "abi.h"

#include <stddef.h>
#include <stdio.h>

int main(void) {
    const char *comma = "";

    printf("{\n  \"constants\": {");
#define X(name, value) printf("%s\n    \"%s\": \"%llu\"", comma, #name, (u64)NVMX_##name), comma = ",";
    NVMX_ALL_CONSTANTS(X)
#undef X
    printf("\n  },\n  \"records\": {");
    comma = "";
#define F(record, type, name, array)                                                                         \
    printf("%s\"%s\": [%zu, %zu]", comma, #name, offsetof(struct nvmx_##record, name),                       \
           sizeof(((struct nvmx_##record *)0)->name)),                                                       \
        comma = ", ";
#define R(record, fields)                                                                                    \
    printf("%s\n    \"%s\": {\"size\": %zu, \"fields\": {", comma, #record, sizeof(struct nvmx_##record));   \
    comma = "";                                                                                              \
    fields(F) printf("}}");                                                                                  \
    comma = ",";
    NVMX_RECORDS(R)
#undef R
#undef F
    printf("\n  }\n}\n");
    return 0;
}
