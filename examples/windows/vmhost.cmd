@echo off
rem The host agent; with words behind it, a verb: vmhost ls
setlocal DisableDelayedExpansion
rem For help and hints: how this is called.
set VMHOST_CALLED=vmhost
rem "": none, also where one is in the folder in which this is typed.
set INI=""
if exist "%~dp0host.ini" set INI="%~dp0host.ini"
"%~dp0python\python.exe" "%~dp0vmhost.pyz" %INI% %*
