// gqsa-probe: the tests' way into single parts.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

// Feed `count` mutated copies of a file to the part that reads such files; 0 where each was read or
// refused with an Error. Anything else that is thrown ends the program.
int fuzz(const std::vector<std::string>& words);

// Answer a request about a whole model: load, free, generate, open, close, prefill or step.
// "fail" has a call of attention fail, in models that are loaded after the first such request.
nlohmann::json answer_of_model(const nlohmann::json& request);
