// gqsa-probe: the tests' way into single parts.
#pragma once

#include <string>
#include <vector>

// Feed `count` mutated copies of a file to the part that reads such files; 0 where each was read or
// refused with an Error. Anything else that is thrown ends the program.
int fuzz(const std::vector<std::string>& words);
